// The steps of instruction sets that have nothing better than plain C++, after packed_embedding_bag_steps.inc.h.

template <class Index>
int resolve_ids(const Index* ids, int count, int64_t num_rows, int32_t* ranks) {
  return resolve_ids_generic(ids, count, num_rows, ranks);
}

// Fills the ring's slots from a block's places in checked runs. A transformed row is read up to kDecodedBytes from its
// first one.
inline Located place(const PackedTable& table, const CheckedRuns& runs, const float* weights, int first, int count,
                     const CheckedPlaces& places, Ring& ring) {
  Located found{places.damaged, false};
  for (int i = 0; i < count; ++i) {
    const int slot = first + i;
    const CheckedRun& run = runs[places.run[i]];
    const bool stored = places.run[i] != runs.none();
    const float weight = ring.rank[slot] == kPruned ? 0.0f : weights != nullptr ? weights[i] : 1.0f;
    ring.start[slot] = places.bit[i] >> 3;
    ring.last[slot] = ring.start[slot] + (!stored ? 0 : run.transformed ? kDecodedBytes - 1
                                                                        : (table.blocks - 1) * run.bits + 7);
    ring.bits[slot] = run.bits;
    ring.scale[slot] = stored && !run.transformed ? weight * run.step : 0.0f;
    ring.kept[slot] = stored ? weight : 0.0f;
    ring.zero[slot] = stored ? 0.0f : weight;
    ring.run[slot] = run.transformed ? places.run[i] : runs.none();
    ring.shift[slot] = static_cast<int32_t>(places.bit[i] & 7);
    ring.weight[slot] = run.transformed ? weight : 0.0f;
    found.mixed |= !stored || weights != nullptr;
  }
  return found;
}

class Locator {
 public:
  // `runs` are the table's if it is coded, else null.
  Locator(const PackedTable& table, const CheckedRuns* runs, Span) : table_(table), runs_(runs) {}

  Rows rows() const {
    return Rows::Any;
  }

  Located locate(const float* weights, int first, int count, Ring& ring) const {
    if (runs_ != nullptr) {
      CheckedPlaces places;
      find_in_checked_runs(table_, *runs_, ring.rank + first, count, places);
      return place(table_, *runs_, weights, first, count, places, ring);
    }
    Places places;
    if (table_.nibble_lines > 0) {
      find_in_nibbles<widths_before>(table_, ring.rank + first, count, places);
    } else {
      find_in_runs(table_, ring.rank + first, count, places);
    }
    return place(table_, weights, first, count, places, ring);
  }

 private:
  const PackedTable& table_;
  const CheckedRuns* runs_;
};

inline void add_weights(const Ring& ring, int first, int count, float& kept, float& zero) {
  for (int i = 0; i < count; ++i) {
    kept += ring.kept[(first + i) & (kRing - 1)];
    zero += ring.zero[(first + i) & (kRing - 1)];
  }
}
