// The kernel of cache_slots.h. Included inside an instruction set's namespace and target region, after <vector>,
// cache_slots.h and the definition of
//   uint32_t equal_ways(const int32_t* set, int32_t value): bit w tells that way w of a set has the value.

// Sets are cache misses: they are asked for this many ids ahead.
constexpr int64_t kIdsAhead = 16;

// row % sets by two products (Lemire, Kaser, Kurz: "Faster remainder by direct computation", 2019).
class SetOf {
 public:
  explicit SetOf(int64_t sets) : sets_(static_cast<uint64_t>(sets)), reciprocal_(~uint64_t{0} / sets_ + 1) {}

  int64_t operator()(int64_t row) const {
    const uint64_t fraction = reciprocal_ * static_cast<uint32_t>(row);
    return static_cast<int64_t>(static_cast<unsigned __int128>(fraction) * sets_ >> 64);
  }

 private:
  uint64_t sets_, reciprocal_;
};

// Of the kWays numbers of a set.
inline int32_t smallest(const int32_t* set) {
  typedef int32_t Half __attribute__((vector_size(64)));
  Half low, high;
  __builtin_memcpy(&low, set, sizeof(low));
  __builtin_memcpy(&high, set + kWays / 2, sizeof(high));
  low = high < low ? high : low;
  int32_t least = low[0];
  for (int w = 1; w < kWays / 2; ++w) {
    least = low[w] < least ? low[w] : least;
  }
  return least;
}

// The way to put a missing row into, or -1; `count` is the row's, with LFU.
inline int64_t victim(const CachedTable& table, int64_t first, int32_t count) {
  const uint32_t empty = equal_ways(table.slot_rows + first, -1);
  if (empty != 0) {
    return __builtin_ctz(empty);
  }
  const int32_t* batches = table.slot_batches + first;
  if (!table.is_lfu()) {
    const int32_t oldest = smallest(batches);
    return oldest < table.oldest_in_flight ? __builtin_ctz(equal_ways(batches, oldest)) : -1;
  }
  constexpr int32_t kNone = INT32_MAX;
  const uint8_t* counts = table.slot_counts + first;
  int32_t key[kWays];  // of unlocked slots
  for (int64_t w = 0; w < kWays; ++w) {
    key[w] = batches[w] < table.oldest_in_flight ? counts[w] : kNone;
  }
  const int32_t coldest = smallest(key);
  if (coldest > count) {
    return -1;
  }
  for (int64_t w = 0; w < kWays; ++w) {
    key[w] = key[w] == coldest ? batches[w] : kNone;
  }
  return __builtin_ctz(equal_ways(key, smallest(key)));
}

// A row of the batch in a slot. Until all ids are seen, the slot's batch is -1 - the hit.
inline void hit(Assignment& assignment, int32_t slot) {
  std::vector<Hit>& hits = assignment.hits;
  int32_t& batch = assignment.table.slot_batches[slot];
  const size_t known = static_cast<size_t>(-1 - static_cast<int64_t>(batch));
  if (batch < 0 && known < hits.size() && hits[known].slot == slot) {
    ++hits[known].lookups;
    return;
  }
  hits.push_back({slot, batch, 1});
  batch = static_cast<int32_t>(-static_cast<int64_t>(hits.size()));
}

template <typename index_t>
void find_rows(Assignment& assignment, const index_t* ids, int64_t n, index_t* locations) {
  const CachedTable& table = assignment.table;
  const SetOf set_of(table.sets);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kIdsAhead < n) {
      const int64_t ahead = kWays * set_of(ids[i + kIdsAhead]);
      for (const int32_t* of_set : {table.slot_rows + ahead, table.slot_batches + ahead}) {
        __builtin_prefetch(of_set);
        __builtin_prefetch(of_set + kWays / 2);
      }
    }
    const int32_t row = static_cast<int32_t>(ids[i]);
    const int64_t first = kWays * set_of(row);
    const uint32_t ways = equal_ways(table.slot_rows + first, row);
    if (ways != 0) {
      const int32_t slot = static_cast<int32_t>(first) + __builtin_ctz(ways);
      hit(assignment, slot);
      locations[i] = slot;
      continue;
    }
    const int32_t next = -1 - static_cast<int32_t>(assignment.misses.size());
    const int32_t found = assignment.elsewhere.find_or_insert(row, next);
    if (found >= 0) {
      hit(assignment, found);
      locations[i] = found;
      continue;
    }
    if (found == next) {
      assignment.misses.push_back({row, 0, {-1, -1, 0, 0, 0}});
    }
    ++assignment.misses[-1 - found].lookups;
    assignment.missing.push_back({i, -1 - found});
  }
}

// What a slot holds, before another row gets it.
inline LostSlot before(Assignment& assignment, int64_t slot) {
  const CachedTable& table = assignment.table;
  const int32_t row = table.slot_rows[slot];
  if (row >= table.num_rows) {
    assignment.bad_slot = slot;
  }
  return {static_cast<int32_t>(slot), row, table.slot_batches[slot], table.slot_dirty[slot],
          table.is_lfu() ? table.slot_counts[slot] : uint8_t{0}};
}

inline void put(const CachedTable& table, int64_t slot, int32_t row, int32_t batch, uint8_t count) {
  table.slot_rows[slot] = row;
  table.slot_batches[slot] = batch;
  table.slot_dirty[slot] = 0;
  if (table.is_lfu()) {
    table.slot_counts[slot] = count;
  }
}

// Places the rows that miss, in order.
inline void place_misses(Assignment& assignment) {
  const CachedTable& table = assignment.table;
  const SetOf set_of(table.sets);
  int64_t free = table.first_spill();  // no free spill slot before
  const int64_t n = static_cast<int64_t>(assignment.misses.size());
  for (int64_t m = 0; m < n; ++m) {
    if (m + kIdsAhead < n) {
      const int32_t row = assignment.misses[m + kIdsAhead].row;
      const int64_t first = kWays * set_of(row);
      __builtin_prefetch(table.slot_batches + first);
      __builtin_prefetch(table.slot_batches + first + kWays / 2);
      __builtin_prefetch(table.slot_dirty + first);
      if (table.is_lfu()) {
        __builtin_prefetch(table.slot_counts + first);
        __builtin_prefetch(table.row_counts + row);
      }
    }
    Miss& miss = assignment.misses[m];
    const uint8_t count =
        table.is_lfu() ? count_lookups(table, table.row_counts[miss.row], miss.row, miss.lookups) : uint8_t{0};
    const int64_t first = kWays * set_of(miss.row);
    const int64_t way = victim(table, first, count);
    int64_t slot = first + way;
    if (way < 0) {
      ++assignment.conflicts;
      while (free < table.slots && table.slot_rows[free] >= 0) {
        ++free;
      }
      if (free == table.slots) {
        ++assignment.needed_spill;
        continue;
      }
      slot = free++;
    }
    miss.before = before(assignment, slot);
    put(table, slot, miss.row, table.batch, count);
  }
}

template <typename index_t>
void assign_slots(Assignment& assignment, const index_t* ids, int64_t n, index_t* locations) {
  const CachedTable& table = assignment.table;
  assignment.lookups = n;
  assignment.needed_spill = table.slots - table.first_spill();
  assignment.elsewhere.clear();
  for (int64_t slot = table.first_spill(); slot < table.slots; ++slot) {
    if (table.slot_rows[slot] >= 0) {
      assignment.elsewhere.find_or_insert(table.slot_rows[slot], static_cast<int32_t>(slot));
    }
  }
  find_rows(assignment, ids, n, locations);
  for (const Hit& found : assignment.hits) {
    table.slot_batches[found.slot] = table.batch;
  }
  for (int64_t slot = table.first_spill(); slot < table.slots; ++slot) {
    if (table.slot_rows[slot] >= 0 && table.slot_batches[slot] < table.oldest_in_flight) {
      assignment.sent_back.push_back(before(assignment, slot));
      put(table, slot, -1, table.slot_batches[slot], 0);
    }
  }
  place_misses(assignment);
  for (const MissingId& id : assignment.missing) {
    locations[id.position] = assignment.misses[id.miss].before.slot;
  }
}

template void assign_slots<int32_t>(Assignment&, const int32_t*, int64_t, int32_t*);
template void assign_slots<int64_t>(Assignment&, const int64_t*, int64_t, int64_t*);
