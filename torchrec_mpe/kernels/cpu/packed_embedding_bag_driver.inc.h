// The steps of a lookup around the accumulator of one instruction set. Included inside that instruction set's namespace
// and target region, after
//   packed_embedding_bag_ring.inc.h and directory_lines.inc.h
//   Accumulator<G>: one bag's sum, clear(), add<kTwoLines>(), finish(), and what is known of G's rows
//   resolve_ids(): ids of a block to ranks
//   Locator(table).locate(): ranks of a block to rows; whatever the directory says, they lie in the weights
//   add_weights(): the sums of kept and zero over neighbouring slots, the first being next to the last
// No include guard: it is compiled once per instruction set.

inline int64_t offset_at(const Lookup& lookup, int64_t bag) {
  return lookup.offsets_64 ? static_cast<const int64_t*>(lookup.offsets)[bag]
                           : static_cast<const int32_t*>(lookup.offsets)[bag];
}

// Functions that only prefetch are always inlined: GCC takes them for pure and drops calls to them.
__attribute__((always_inline)) inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// --- steps, a block at a time ---------------------------------------------------------------------------------------

template <class Index>
__attribute__((always_inline)) inline void fetch_directory(const PackedTable& table, const Index* ids, int count) {
  const uint64_t rows = table.num_rows;
  for (int i = 0; i < count; ++i) {
    const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[i])) < rows ? ids[i] : 0;
    switch (table.kind) {
      case Directory::Ranked:
        return;
      case Directory::Remap:
        prefetch(table.directory + 4 * id);
        break;
      case Directory::Nibble:
        prefetch(table.directory + id / kNibbleRows * kLineBytes);
        break;
      case Directory::Bitmap:
      case Directory::BitmapNibble:
        prefetch(table.directory + id / kBitmapRows * kLineBytes);
        break;
    }
  }
}

// Ids to ranks, in [0, num_rows), kPruned or kZeroBits; bounds are checked here.
template <class Index>
void resolve(const Lookup& lookup, const PackedTable& table, int64_t position, int count, int32_t* ranks,
             Faults& faults, int64_t feature) {
  const Index* ids = static_cast<const Index*>(lookup.indices) + position;
  const int bad = resolve_ids(ids, count, table.num_rows, ranks);
  if (__builtin_expect(bad != 0, 0)) {
    if (faults.bad_ids == 0) {
      for (int i = 0; i < count && faults.first_bad_id < 0; ++i) {
        const int64_t id = ids[i];
        if (id != -1 && (id < 0 || id >= table.num_rows)) {
          faults.first_bad_id = position + i;
          faults.bad_id_feature = feature;
        }
      }
    }
    faults.bad_ids += bad;
  }
  if (table.kind == Directory::Remap) {
    const int32_t* remap = reinterpret_cast<const int32_t*>(table.directory);
    const uint32_t rows = static_cast<uint32_t>(table.num_rows);
    for (int i = 0; i < count; ++i) {
      const uint32_t rank = ranks[i] < 0 ? 0 : remap[ranks[i]];
      ranks[i] = ranks[i] < 0 ? ranks[i] : rank < rows ? rank : 0;
    }
  } else if (table.kind == Directory::Bitmap || table.kind == Directory::BitmapNibble) {
    for (int i = 0; i < count; ++i) {
      ranks[i] = ranks[i] < 0 ? ranks[i] : bitmap_rank(table.directory, ranks[i]);
    }
    if (table.nibble_lines > 0) {
      for (int i = 0; i < count; ++i) {
        const int64_t line = ranks[i] < 0 ? 0 : ranks[i] / kNibbleRows;
        prefetch(table.nibbles + std::min(line, table.nibble_lines - 1) * kLineBytes);
      }
    }
  }
}

// Fetches a row that is read later. Rows that can span more than two lines have some between.
template <bool kLong, bool kTwoLines>
__attribute__((always_inline)) inline void fetch_row(const uint8_t* weights, const Ring& ring, int slot) {
  const int64_t start = ring.start[slot];
  const int64_t last = ring.last[slot];
  prefetch(weights + start);
  if (kLong) {
    for (int64_t byte = start + kLineBytes; byte < last; byte += kLineBytes) {
      prefetch(weights + byte);
    }
  }
  if (kLong || kTwoLines) {
    prefetch(weights + last);
  }
}

// Where a bag's pooled embedding goes, and what turns the sum of its rows into it.
struct BagOutput {
  float kept;       // sum of the weights of its rows of more than 0 bits
  float zero;       // and of its 0-bit rows
  float factor;
  int64_t position;
};

// Adds rows [row, stop) of a feature to a bag's sum, which starts at zero or is carried on, and stores or carries it.
// A function of its own, with nothing called between: what the loop needs stays in registers.
template <int G, bool kTwoLines>
__attribute__((noinline)) void pool_rows(Accumulator<G>& accumulator, const PackedTable& table, const Lookup& lookup,
                                         const Ring& ring, int64_t row, int64_t stop, bool starts, bool ends,
                                         typename Accumulator<G>::Sum& carried, const BagOutput& bag) {
  const typename Accumulator<G>::Registers registers;
  typename Accumulator<G>::Sum sum;
  accumulator.clear(sum, starts);
  if (__builtin_expect(!starts, 0)) {
    sum = carried;
  }
  const uint8_t* weights = table.weights;
  for (; row < stop; ++row) {
    fetch_row<Accumulator<G>::kLongRows, kTwoLines>(weights, ring, static_cast<int>((row + kBlock) & (kRing - 1)));
    accumulator.template add<kTwoLines>(sum, registers, weights, ring, static_cast<int>(row & (kRing - 1)));
  }
  if (__builtin_expect(!ends, 0)) {
    carried = sum;
    return;
  }
  accumulator.finish(sum, table, bag.kept, bag.zero, bag.factor, lookup.output, lookup.output_type, bag.position);
}

// A feature's bags [first, last), numbered among all features' bags.
template <int G, class Index, bool kTwoLines>
void lookup_rows(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults,
                 const Locator& locator) {
  const Feature& feature = lookup.features[f];
  const PackedTable& table = *feature.table;
  const int64_t begin = offset_at(lookup, first);
  const int64_t end = offset_at(lookup, last);
  if (begin < 0 || end < begin || end > lookup.num_indices) {
    faults.bad_offset = first;
    return;
  }
  Ring ring;
  std::fill_n(ring.start, kRing, 0);
  std::fill_n(ring.last, kRing, 0);
  const int64_t rows = end - begin;
  const auto fetch_block = [&](int64_t row) {
    if (row < rows) {
      const Index* ids = static_cast<const Index*>(lookup.indices) + begin + row;
      fetch_directory(table, ids, static_cast<int>(std::min<int64_t>(kBlock, rows - row)));
    }
  };
  const auto resolve_block = [&](int64_t row) {
    if (row < rows) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, rows - row));
      resolve<Index>(lookup, table, begin + row, count, ring.rank + row % kRing, faults, f);
    }
  };
  int64_t located = 0;    // rows of the feature that are located
  int64_t mixed_end = 0;  // the end of the last of their blocks that was mixed
  const auto advance = [&] {
    fetch_block(located + 2 * kBlock);
    resolve_block(located + kBlock);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, rows - located));
    const float* weights = lookup.weights == nullptr ? nullptr : lookup.weights + begin + located;
    const Located found = locator.locate(weights, static_cast<int>(located % kRing), count, ring);
    located += count;
    if (found.mixed) {
      mixed_end = located;
    }
    if (__builtin_expect(found.damaged, 0)) {
      faults.damaged_feature = f;
    }
  };
  fetch_block(0);
  fetch_block(kBlock);
  resolve_block(0);

  Accumulator<G> accumulator(table.embedding_dim, table.blocks);
  typename Accumulator<G>::Sum carried;
  int64_t row = 0;
  int64_t bag_end = 0;
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t bag_begin = bag_end;
    const int64_t offset = offset_at(lookup, bag + 1);
    if (__builtin_expect(offset < begin + bag_begin || offset > end, 0)) {
      faults.bad_offset = bag;
      return;
    }
    bag_end = offset - begin;
    BagOutput output{0.0f, 0.0f, 1.0f, (bag - f * lookup.batch) * lookup.output_stride + feature.column};
    if (feature.mean && bag_end > bag_begin) {
      output.factor = 1.0f / static_cast<float>(bag_end - bag_begin);
    }
    do {
      const int64_t stop = std::min(bag_end, row + kSegment);
      while (located < rows && located < stop + kBlock) {
        advance();
      }
      if (mixed_end <= row) {
        output.kept += static_cast<float>(stop - row);
      } else {
        const int slot = static_cast<int>(row & (kRing - 1));
        const int count = static_cast<int>(stop - row);
        add_weights(ring, slot, count, output.kept, output.zero);
      }
      pool_rows<G, kTwoLines>(accumulator, table, lookup, ring, row, stop, row == bag_begin, stop == bag_end, carried,
                              output);
      row = stop;
    } while (row < bag_end);
  }
}

template <int G, class Index>
void lookup_feature(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  const Locator locator(*lookup.features[f].table);
  if constexpr (Accumulator<G>::kHasOneLine) {
    if (locator.one_line()) {
      lookup_rows<G, Index, false>(lookup, f, first, last, faults, locator);
      return;
    }
  }
  lookup_rows<G, Index, true>(lookup, f, first, last, faults, locator);
}

template <int G>
void lookup_feature_of(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  if (lookup.indices_64) {
    lookup_feature<G, int64_t>(lookup, f, first, last, faults);
  } else {
    lookup_feature<G, int32_t>(lookup, f, first, last, faults);
  }
}

void lookup_feature_by_dim(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults);

void lookup_bags(const Lookup& lookup, int64_t first, int64_t last, Faults& faults) {
  while (first < last) {
    const int64_t f = first / lookup.batch;
    const int64_t end = std::min(last, (f + 1) * lookup.batch);
    lookup_feature_by_dim(lookup, f, first, end, faults);
    first = end;
  }
}
