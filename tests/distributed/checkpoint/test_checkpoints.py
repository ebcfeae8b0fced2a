"""Saving in the background, failures of one rank, and what a checkpoint is refused for."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe
from tests.distributed.checkpoint.runs import (
    CONFIG,
    CW,
    INITIALIZATION,
    RW,
    TW,
    Model,
    Run,
    Training,
    counts,
    equal,
    plan,
    prepared,
    shard,
    whole,
)
from tests.distributed.ranks import Ranks
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.modules.embedding_bag_collection import Phase


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def save_while_training(folder: str) -> list[Any]:
    """Saves in the background while rows, quantizers and optimizer state are overwritten before a byte is written."""
    changed = threading.Event()
    write = FileSystemWriter.write_data

    def write_later(*arguments: Any) -> Any:
        assert changed.wait(60)
        return write(*arguments)

    training = Training(Run("search", (TW, RW, CW)))
    training.steps(0, 2)
    checkpoints = mpe.Checkpoints(folder)
    FileSystemWriter.write_data = write_later
    try:
        training.save(checkpoints, 2, asynchronous=True)
        state = training.state()
        unfinished = not [entry for entry in Path(folder).iterdir() if entry.name.startswith("0")]
        with torch.no_grad():
            for _, _, _, values in training.model.module.ebc.local_shards():
                values.fill_(7)
            for parameter in training.model.module.ebc.mpe.parameters():
                parameter.fill_(7)
        later = training.steps(2, 4)
        changed.set()
        checkpoints.wait()
    finally:
        FileSystemWriter.write_data = write
    training.save(checkpoints, 4, asynchronous=True)
    found = checkpoints.newest()
    assert found is not None
    return [state, unfinished, later, found.step]


def test_training_goes_on_during_a_save_and_does_not_leak_into_it(
    tmp_path: Path, two_ranks: Ranks, one_rank: None
) -> None:
    by_rank = two_ranks.run(save_while_training, str(tmp_path))
    assert all(unfinished for _, unfinished, _, _ in by_rank), "the save must return before anything is written"
    assert all(np.isfinite(losses).all() and newest == 4 for _, _, losses, newest in by_rank)
    checkpoints = mpe.Checkpoints(tmp_path)
    run = Run("search", (TW, RW, CW))
    first, second = checkpoints.complete()
    training = Training(run, first.prepare_(Model(run)))
    with pytest.warns(RuntimeWarning, match="seeded anew"):
        training.load(checkpoints, first, optimizer_state="where possible")
    for kind, tables in (("rows", {"t0", "t1", "t2"}), ("fused0", {"t0", "t1"})):
        expected, got = whole([rank[0] for rank in by_rank], kind), whole([training.state()], kind)
        for table in tables:
            np.testing.assert_array_equal(got[table], expected[table], err_msg=f"{kind} of {table}")
    for name, value in by_rank[0][0].items():
        if name.startswith(("dense/", "adam/")):
            np.testing.assert_array_equal(training.state()[name], value, err_msg=name)
    assert (first.step, second.step) == (2, 4)


def save_with_failures(folder: str) -> list[str]:
    """What is said when rank 1 cannot write, at once or in the background, and what is left."""
    training = Training(Run("retrain", (RW,)))
    checkpoints = mpe.Checkpoints(folder)
    training.save(checkpoints, 1)
    write = FileSystemWriter.write_data

    def fail(*arguments: Any) -> Any:
        raise OSError("no space left on device")

    said = []

    def attempt(action: Callable[[], Any]) -> None:
        try:
            action()
            said.append("fine")
        except RuntimeError as error:
            said.append(str(error))

    for asynchronous in (False, True):
        if dist.get_rank() == 1:
            FileSystemWriter.write_data = fail
        try:
            attempt(lambda a=asynchronous: training.save(checkpoints, 2, asynchronous=a))
            attempt(lambda a=asynchronous: training.save(checkpoints, 3) if a else checkpoints.wait())
        finally:
            FileSystemWriter.write_data = write
        found = checkpoints.newest()
        said.append("" if found is None else str(found.step))
    training.save(checkpoints, 4)
    return said


def test_a_rank_that_cannot_write_is_told_on_all_and_costs_only_that_save(tmp_path: Path, two_ranks: Ranks) -> None:
    for said in two_ranks.run(save_with_failures, str(tmp_path)):
        for message in (said[0], said[4]):
            assert message.startswith(f"the checkpoint of step 2 could not be written to {tmp_path}: rank 0: ")
            assert "no space left on device (on rank 1)" in message
        assert [said[1], said[3]] == ["fine", "fine"] and [said[2], said[5]] == ["1", "1"]
    names = entries(tmp_path)
    assert [name for name in names if name.startswith("0")] == ["00000001-retrain-step-1", "00000002-retrain-step-4"]
    assert not [name for name in names if name.startswith(".")] and len(names) == 3


def refused_on_one_rank(folder: str) -> str:
    """One rank's mistake must not leave the other waiting."""
    run = Run("retrain")
    training = Training(run)
    optimizer: Any = training.optimizer
    if dist.get_rank() == 1:
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(3))])
    try:
        mpe.Checkpoints(folder).save(training.model, optimizer, step=1, plan=plan(run))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_mistake_of_one_rank_ends_the_save_on_all(tmp_path: Path, two_ranks: Ranks) -> None:
    said = two_ranks.run(refused_on_one_rank, str(tmp_path))
    assert said[0].startswith("RuntimeError: rank 1 failed: ValueError: the optimizer has a parameter of shape (3,)")
    assert said[1].startswith("ValueError: the optimizer has a parameter of shape (3,)")
    assert entries(tmp_path) == []


def test_counts_and_plans_are_stored_once_and_removed_with_their_last_checkpoint(
    tmp_path: Path, one_rank: None
) -> None:
    training = Training(Run("search"))
    checkpoints = mpe.Checkpoints(tmp_path, keep=2)
    given = counts(training.run)
    for step in (1, 2, 3):
        training.save(checkpoints, step, counts=given)
    shared = [name for name in entries(tmp_path) if name.startswith("counts-")]
    assert len(shared) == 1 and entries(tmp_path)[:2] == ["00000002-search-step-2", "00000003-search-step-3"]
    inode = (tmp_path / shared[0] / "counts.safetensors").stat().st_ino
    mpe.Checkpoints(tmp_path, keep=2).save(training.model, step=4, counts=counts(training.run))
    assert (tmp_path / shared[0] / "counts.safetensors").stat().st_ino == inode, "equal content is not stored again"

    wanted = plan(training.run)
    mpe.prepare_retrain_(training.model, wanted)
    checkpoints.save(training.model, step=0, plan=wanted)
    found = checkpoints.newest()
    assert found is not None and found.phase is Phase.RETRAIN and found.step == 0, "the last saved is the newest"
    assert [name.split("-")[0] for name in entries(tmp_path)] == ["00000004", "00000005", "counts", "plan"]
    checkpoints.save(training.model, step=1, plan=wanted)
    assert [name.split("-")[0] for name in entries(tmp_path)] == ["00000005", "00000006", "plan"]
    assert found.plan().tables == wanted.tables and found.plan().initialization == INITIALIZATION
    with pytest.raises(ValueError, match="has no counts: it is of the retrain phase"):
        found.counts()


def test_search_settings_and_counts_come_back(tmp_path: Path, one_rank: None) -> None:
    run = Run("search")
    checkpoints = mpe.Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    Training(run).save(checkpoints, 5)
    found = checkpoints.newest()
    assert found is not None and found.search_config == CONFIG and found.phase is Phase.SEARCH
    assert (found.step, found.position, found.world_size) == (5, {"epoch": 0, "batch": 5}, 1)
    assert all(torch.equal(found.counts()[table], values) for table, values in counts(run).items())
    model = found.prepare_(Model(run))
    wanted = prepared(run)
    for name, buffer in wanted.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name


def test_what_prepared_the_model_must_be_given_and_be_right(tmp_path: Path, one_rank: None) -> None:
    searching, retraining = Training(Run("search")), Training(Run("retrain"))
    checkpoints = mpe.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="search phase needs the counts"):
        checkpoints.save(searching.model, step=1)
    with pytest.raises(ValueError, match="retrain phase needs the plan"):
        checkpoints.save(retraining.model, step=1, counts=counts(Run()))
    with pytest.raises(ValueError, match="the counts of tables t0, t1 are not those that the model was prepared with"):
        checkpoints.save(searching.model, step=1, counts=counts(Run(), seed=2))
    with pytest.raises(ValueError, match="the plan of tables t0, t1 is not the one"):
        checkpoints.save(retraining.model, step=1, plan=plan(Run(), fraction=0.2))
    assert entries(tmp_path) == []
    checkpoints.save(retraining.model, step=1, plan=(same := plan(Run())))
    mpe.prepare_retrain_(retraining.model, plan(Run(), fraction=0.2))
    with pytest.raises(ValueError, match="is not the one that the model was prepared with"):
        checkpoints.save(retraining.model, step=2, plan=same)


def test_a_model_unlike_the_checkpoint_is_refused_before_anything_changes(tmp_path: Path, one_rank: None) -> None:
    run = Run("search", (TW,))
    training = Training(run)
    training.steps(0, 2)
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 2)
    found = checkpoints.newest()
    assert found is not None

    def refused(other: Training, match: str, optimizer: Any = None, **more: Any) -> None:
        before = other.state()
        with pytest.raises(ValueError, match=match):
            checkpoints.load(other.model, optimizer, found, **more)
        assert list(equal(before, other.state())) == []

    refused(
        Training(Run("plain")), r"is of the search phase, the model is in the plain phase: call checkpoint.prepare_"
    )
    other_counts = Model(run)
    mpe.prepare_search_(other_counts, counts(run, seed=2), CONFIG)
    refused(Training(run, other_counts), "ebc.mpe.dim_16 was prepared with other counts|ebc.mpe.dim_8 was prepared")
    wider = found.prepare_(Model(run))
    wider.linear = nn.Linear(32, 2)
    refused(Training(run, wider), r"model.linear.bias has shape \(2,\), in the checkpoint it is \(1,\)")
    more = found.prepare_(Model(run))
    more.extra = nn.Linear(2, 2)
    refused(Training(run, more), "the model has, and the checkpoint .* has not: model.extra.bias, model.extra.weight")
    less = found.prepare_(Model(run))
    less.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"the checkpoint .* has, and the model has not: model.norm.bias"):
        checkpoints.load(shard(less, run), None, found)
    same = Training(run, found.prepare_(Model(run)))
    one_group = torch.optim.Adam([p for _, p in in_backward_optimizer_filter(same.model.named_parameters())])
    refused(same, r"the optimizer has \[1\] parameter groups, the saved one \[2\]", one_group)
    with pytest.raises(KeyError, match="has no state of 'other'; it has: schedule"):
        checkpoints.load(same.model, None, found, extra={"other": same.schedule})


def test_an_unsharded_model_loads_rows_without_ranks(tmp_path: Path) -> None:
    run = Run("retrain", (TW, RW, CW))
    checkpoints = mpe.Checkpoints(tmp_path)
    with process_group(torch.device("cpu")):
        training = Training(run)
        training.steps(0, 2)
        training.save(checkpoints, 2)
        state = training.state()
    checkpoints = mpe.Checkpoints(tmp_path)
    found = checkpoints.newest()
    assert found is not None
    model = found.prepare_(Model(run))
    with pytest.raises(ValueError, match=r"embedding_bags.t0.weight: the model here is not sharded"):
        checkpoints.load(model, None, found)
    checkpoints.load(model, None, found, optimizer_state=False)
    for table, rows in whole([state], "rows").items():
        np.testing.assert_array_equal(model.ebc.embedding_bags[table].weight.detach().numpy(), rows, err_msg=table)
    for name, parameter in model.named_parameters():
        if "embedding_bags" not in name:
            np.testing.assert_array_equal(parameter.detach().numpy(), state[f"dense/{name}"], err_msg=name)
    with pytest.raises(TypeError, match="a Model is not sharded"):
        checkpoints.save(model, step=3)  # type: ignore[arg-type]


def test_torchrec_optimizers_are_taken_apart(tmp_path: Path, one_rank: None) -> None:
    run = Run("retrain", (TW,))
    training = Training(run)
    training.steps(0, 2)
    wrapped = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(training.model.named_parameters())), lambda _: training.optimizer
    )
    combined = CombinedOptimizer([training.model.fused_optimizer, ("dense", wrapped)])
    checkpoints = mpe.Checkpoints(tmp_path)
    checkpoints.save(training.model, combined, step=2, plan=plan(run))
    found = checkpoints.newest()
    assert found is not None
    other = Training(run, found.prepare_(Model(run)))
    checkpoints.load(other.model, other.optimizer, found)
    for key, value in training.state().items():
        if key.startswith(("adam/", "fused0/")):
            np.testing.assert_array_equal(other.state()[key], value, err_msg=key)


def test_going_on_without_optimizer_state_clears_what_was_there(tmp_path: Path, one_rank: None) -> None:
    run = Run("retrain", (TW, RW, CW))
    training = Training(run)
    training.steps(0, 2)
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 2)
    saved = training.state()
    found = checkpoints.newest()
    assert found is not None
    training.steps(2, 4)
    training.load(checkpoints, found, optimizer_state=False)
    state = training.state()
    for key, value in state.items():
        if key.startswith("fused0/"):
            assert saved[key].any() and not value.any(), key
        elif key.startswith("iter/"):
            assert value == 0, key
        elif key.startswith(("rows/", "dense/", "adam/")):
            np.testing.assert_array_equal(value, saved[key], err_msg=key)


def test_learning_rates_come_back(tmp_path: Path, one_rank: None) -> None:
    """Of the dense optimizer and of the fused ones, whether read from the TBE or set by its optimizer's step."""
    run = Run("plain", (TW,))
    training = Training(run)
    for group in training.model.fused_optimizer.param_groups:
        group["lr"] = 0.0625
    training.model.fused_optimizer.step()
    training.optimizer.param_groups[0]["lr"] = 0.5
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 1)
    other = Training(run)
    found = checkpoints.newest()
    assert found is not None
    other.load(checkpoints, found)
    for _ in range(2):
        assert all(kernel.emb_module.get_learning_rate() == 0.0625 for kernel in other.model.module.ebc.kernels())
        other.model.fused_optimizer.step()
    assert other.optimizer.param_groups[0]["lr"] == 0.5 and other.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_frequencies_tracked_in_training_come_along(tmp_path: Path, one_rank: None) -> None:
    run = Run("plain", (TW, RW, TW))
    training = Training(run)
    tracked = mpe.track_frequencies_(training.model)
    training.steps(0, 2)
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 2, extra={"schedule": training.schedule, "frequencies": tracked})
    expected = tracked.merged()
    assert sum(int(values.sum()) for values in expected.values()) > 0
    other = Training(Run("plain", (RW, TW, RW)))
    again = mpe.track_frequencies_(other.model)
    found = checkpoints.newest()
    assert found is not None
    checkpoints.load(other.model, other.optimizer, found, extra={"frequencies": again})
    for table, values in again.merged().items():
        assert torch.equal(values, expected[table]), table


def test_damaged_files_are_noticed(tmp_path: Path, one_rank: None) -> None:
    run = Run("plain")
    training = Training(run)
    checkpoints = mpe.Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        training.save(checkpoints, step)
    _, second, third = checkpoints.complete()
    data = next(third.path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (second.path / ".metadata").unlink()
    with pytest.warns(RuntimeWarning, match=r"passed over: checkpoint .*step-\d is damaged"):
        found = checkpoints.newest()
    assert found is not None and found.step == 1


@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
def test_a_flipped_bit_of_any_file_is_noticed(phase: str, tmp_path: Path, one_rank: None) -> None:
    """By newest, which passes it over, and by load before anything changes."""
    training = Training(Run(phase))
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 1)
    training.steps(0, 1)
    training.save(checkpoints, 2, asynchronous=True)
    first, second = checkpoints.complete()
    manifest = second.manifest
    assert (
        manifest["file_sha256"].keys()
        == manifest["files"].keys()
        == {p.name for p in second.path.iterdir()} - {"checkpoint.json"}
    )
    shared = [tmp_path / manifest[kind] for kind in ("counts", "plan") if manifest[kind] is not None]
    assert len(shared) == (phase != "plain")
    for file in sorted([*second.path.iterdir(), *(next(folder.iterdir()) for folder in shared)]):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            again = mpe.Checkpoints(tmp_path)
            with pytest.warns(RuntimeWarning, match="passed over: ") as said:
                found = again.newest()
            if file.parent.name in first.manifest.values():  # both refer to it
                assert found is None and len(said) == 2
            else:
                assert found is not None and found.step == 1
            if file.name != "checkpoint.json":
                before = training.state()
                with pytest.raises(ValueError, match=rf"is damaged: \S*{file.name} has another digest"):
                    training.load(again, second)
                assert not list(equal(training.state(), before))
        file.write_bytes(content)
    found = mpe.Checkpoints(tmp_path).newest()
    assert found is not None and found.step == 2


def test_a_manifest_of_whatever_kind_never_stops_a_job(tmp_path: Path, one_rank: None) -> None:
    training = Training(Run("plain"))
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 1)
    training.save(checkpoints, 2)
    file = sorted(tmp_path.glob("*/checkpoint.json"))[-1]
    document = json.loads(file.read_text())
    lies = [
        {"files": 3},
        {"files": {"../../x": 1}},
        {"files": {"a": None}},
        {"counts": 5},
        {"file_sha256": 3},
        {"step": {}},
    ]
    for text in (
        "", "{", "[" * 10**5, "null", "7", '"a"', "\udc00",
        *(json.dumps({**document, **lie, "sha256": ""}) for lie in lies),
    ):  # fmt: skip
        file.write_text(text, errors="surrogatepass")
        with pytest.warns(RuntimeWarning, match=r"passed over: (checkpoint )?\S*00000002-plain-step-2"):
            found = mpe.Checkpoints(tmp_path).newest()
        assert found is not None and found.step == 1


def test_a_folder_of_another_release_or_of_something_else_is_told(tmp_path: Path, one_rank: None) -> None:
    training = Training(Run("plain"))
    checkpoints = mpe.Checkpoints(tmp_path)
    training.save(checkpoints, 1)
    found = checkpoints.newest()
    assert found is not None
    manifest = found.path / "checkpoint.json"
    text = manifest.read_text()
    for changed, said in (
        (
            text.replace('"version": 1', '"version": 2', 1),
            "is a checkpoint's manifest of version 2, this release reads version 1",
        ),
        ("[]", "is not a checkpoint's manifest"),
        (text.replace('"step"', '"stop"', 1), "is not a valid manifest: its digest is not that of its other entries"),
    ):
        manifest.write_text(changed)
        with pytest.warns(RuntimeWarning, match=said):
            assert checkpoints.newest() is None
    with pytest.raises(ValueError, match="keep must be at least 1"):
        mpe.Checkpoints(tmp_path, keep=0)
