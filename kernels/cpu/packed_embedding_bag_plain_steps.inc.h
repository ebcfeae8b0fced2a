// The steps of instruction sets that have nothing better than plain C++, after packed_embedding_bag_steps.inc.h.

template <class Index>
int resolve_ids(const Index* ids, int count, int64_t num_rows, int32_t* ranks) {
  return resolve_ids_generic(ids, count, num_rows, ranks);
}

class Locator {
 public:
  explicit Locator(const PackedTable& table) : table_(table) {}

  Rows rows() const {
    return Rows::Any;
  }

  Located locate(const float* weights, int first, int count, Ring& ring) const {
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
};

inline void add_weights(const Ring& ring, int first, int count, float& kept, float& zero) {
  for (int i = 0; i < count; ++i) {
    kept += ring.kept[(first + i) & (kRing - 1)];
    zero += ring.zero[(first + i) & (kRing - 1)];
  }
}
