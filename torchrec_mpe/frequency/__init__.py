"""Counting lookups, and cutting rows into feature groups by frequency."""

from torchrec_mpe.frequency.counter import FrequencyCounter, count_frequencies, embedding_bag_configs
from torchrec_mpe.frequency.groups import FeatureGroups, equal_groups, log_rank_groups
from torchrec_mpe.frequency.ranks import frequency_ranks, is_frequency_ranked

__all__ = [
    "FeatureGroups",
    "FrequencyCounter",
    "count_frequencies",
    "embedding_bag_configs",
    "equal_groups",
    "frequency_ranks",
    "is_frequency_ranked",
    "log_rank_groups",
]
