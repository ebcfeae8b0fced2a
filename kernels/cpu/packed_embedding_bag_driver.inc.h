// The steps of a lookup around the accumulator of one instruction set. Included inside that instruction set's namespace
// and target region, after
//   packed_embedding_bag_ring.inc.h and directory_lines.inc.h
//   Accumulator<G>: one bag's sum, clear(), add<Rows>(), unbias<Rows>(), add_components(), finish(), and what is known
//     of G's rows
//   Decoder(runs, span): adds transformed rows to a Decoder::Sum of their components, and joins two of them
//   resolve_ids(): ids of a block to ranks
//   Locator(table, runs, span).locate(): ranks of a block to rows; whatever the directory says, they lie in the weights
//   add_weights(): the sums of kept and zero over neighbouring slots, the first being next to the last
// No include guard: it is compiled once per instruction set.

inline int64_t offset_at(const Lookup& lookup, int64_t bag) {
  return lookup.offsets_64 ? static_cast<const int64_t*>(lookup.offsets)[bag]
                           : static_cast<const int32_t*>(lookup.offsets)[bag];
}

__attribute__((always_inline)) inline void prefetch(const void* address) {
#if defined(__x86_64__)
  // To the second level: the first one's few fill buffers would make fetching wait. Volatile, because GCC takes
  // functions that only prefetch for pure and drops calls to them.
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

// Asks for the memory of an embedding that is written later; its line must be owned before it can be.
__attribute__((always_inline)) inline void fetch_output(const Lookup& lookup, const PackedTable& table,
                                                        int64_t position) {
  const int64_t element = lookup.output_type == OutputType::Float ? 4 : 2;
  const char* first = static_cast<const char*>(lookup.output) + position * element;
  const char* end = first + table.embedding_dim * element;
  for (const char* line = first; line < end; line += kLineBytes) {
#if defined(__x86_64__)
    asm volatile("prefetchw %0" : : "m"(*line));
#else
    __builtin_prefetch(line, 1);
#endif
  }
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
      case Directory::Wavelet:
        prefetch(table.directory + (table.splits->line + id / kBitmapRows) * kLineBytes);
        break;
    }
  }
}

// Ids of a block to ranks, split by split, so that each split's line is fetched before it is read; returns false if any
// leads out of the directory, and is now one of 0 bits. Without branches on where a row goes on: they would be guessed
// wrong often. What a list gets of a row that does not belong to it, the next one overwrites.
__attribute__((noinline)) inline bool resolve_wavelet(const PackedTable& table, int count, int32_t* ranks) {
  int32_t slots[kBlock + 1];   // of rows that meet a split,
  int32_t rows[kBlock + 1];    // their rows of it,
  int32_t splits[kBlock + 1];  // which one,
  const uint8_t* lines[kBlock + 1];  // and the line of its bitmap that has their bits
  int32_t word_slots[kBlock + 1];  // of rows whose ranks stand in the directory,
  const uint8_t* words[kBlock + 1];  // and where
  constexpr uint32_t kRows = kBitmapRows;  // dividing 32 bits takes less
  const uint8_t* directory = table.directory;
  int left = 0;
  int num_words = 0;
  for (int i = 0; i < count; ++i) {
    slots[left] = i;
    rows[left] = ranks[i];
    splits[left] = 0;
    const uint32_t row = static_cast<uint32_t>(std::max(ranks[i], 0));
    lines[left] = directory + (table.splits->line + row / kRows) * kLineBytes;
    left += ranks[i] >= 0;
  }
  uint32_t unsound = 0;
  while (left > 0) {
    int next = 0;
    for (int i = 0; i < left; ++i) {
      const int32_t slot = slots[i];
      const Split& split = table.splits[splits[i]];
      const uint32_t found = bitmap_bits(lines[i], static_cast<int>(static_cast<uint32_t>(rows[i]) % kRows));
      const int32_t is_rest = (found >> 31) == 0;
      const int32_t rest = -is_rest;  // all bits are set
      // Unsigned, so that damaged ranks wrap around.
      const uint32_t mask = static_cast<uint32_t>(rest);
      const uint32_t kept = found & 0x7fffffffu;
      const uint32_t kept_rows = static_cast<uint32_t>(split.kept);
      const uint32_t of_half = kept_rows + (mask & (static_cast<uint32_t>(split.rows) - 2 * kept_rows));
      const uint32_t in_half = kept + (mask & (static_cast<uint32_t>(rows[i]) - 2 * kept));
      const bool inside = in_half < of_half;
      const int32_t row = inside ? static_cast<int32_t>(in_half) : 0;
      // Without rows a half has nothing that can be read.
      const int32_t there = (&split.set)[is_rest] & -static_cast<int32_t>(inside);
      unsound |= !inside;
      ranks[slot] = inside ? split.first + (rest & split.kept) + row : kZeroBits;
      const int32_t following = std::max(there, 0);
      const uint8_t* word = directory + std::max(-there, 0) * kLineBytes + int64_t{4} * row;
      const int64_t line_of_row = static_cast<uint32_t>(row) / kRows;
      const uint8_t* line = directory + (table.splits[following].line + line_of_row) * kLineBytes;
      prefetch(there < 0 ? word : line);
      slots[next] = slot;
      rows[next] = row;
      splits[next] = following;
      lines[next] = line;
      next += there > 0;
      word_slots[num_words] = slot;
      words[num_words] = word;
      num_words += there < 0;
    }
    left = next;
  }
  for (int i = 0; i < num_words; ++i) {
    int32_t rank;
    std::memcpy(&rank, words[i], 4);
    const bool inside = static_cast<uint32_t>(rank) < static_cast<uint32_t>(table.num_rows);
    unsound |= !inside;
    ranks[word_slots[i]] = inside ? rank : kZeroBits;
  }
  return unsound == 0;
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
    bool damaged = false;
    for (int i = 0; i < count; ++i) {
      const uint32_t rank = ranks[i] < 0 ? 0 : remap[ranks[i]];
      damaged |= rank >= rows;
      ranks[i] = ranks[i] < 0 ? ranks[i] : rank < rows ? static_cast<int32_t>(rank) : kZeroBits;
    }
    if (__builtin_expect(damaged, 0)) {
      faults.damaged_feature = feature;
    }
  } else if (table.kind == Directory::Wavelet) {
    if (__builtin_expect(!resolve_wavelet(table, count, ranks), 0)) {
      faults.damaged_feature = feature;
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

// Fetches a row that is read later, of up to kLines lines; 0: any number.
template <int kLines>
__attribute__((always_inline)) inline void fetch_row(const uint8_t* weights, const Ring& ring, int slot) {
  const int64_t start = ring.start[slot];
  prefetch(weights + start);
  if (kLines == 1) {
    return;
  }
  const int64_t last = ring.last[slot];
  if (kLines == 3) {
    prefetch(weights + std::min(start + kLineBytes, last));
  } else if (kLines == 0) {
    for (int64_t byte = start + kLineBytes; byte < last; byte += kLineBytes) {
      prefetch(weights + byte);
    }
  }
  prefetch(weights + last);
}

// A bag's sum: of plain rows, and of the components of transformed ones.
template <int G>
struct BagSum {
  typename Accumulator<G>::Sum plain;
  Decoder::Sum components;
};

// Adds plain rows [row, stop) of a feature, at most a block, to a bag's sum.
template <int G, Rows kRows>
__attribute__((always_inline)) inline void add_plain(
    Accumulator<G>& accumulator, typename Accumulator<G>::Sum& sum,
    const typename Accumulator<G>::template Registers<kRows>& registers, const uint8_t* weights, const Ring& ring,
    int64_t row, int64_t stop) {
  float scales = 0.0f;
  for (; row < stop; ++row) {
    const int slot = static_cast<int>(row & (kRing - 1));
    constexpr int kLines = Accumulator<G>::kLines == 2 && kRows == Rows::NarrowInLine ? 1 : Accumulator<G>::kLines;
    fetch_row<kLines>(weights, ring, static_cast<int>((row + kBlock) & (kRing - 1)));
    accumulator.template add<kRows>(sum, registers, weights, ring, slot);
    if (kRows != Rows::Any) {
      scales += ring.scale[slot];
    }
  }
  // Every few rows: a bias that had grown with the whole bag would take the sum's last digits with it.
  if (kRows != Rows::Any) {
    accumulator.template unbias<kRows>(sum, scales);
  }
}

// The same of at most a segment of rows of both kinds, without a branch on a row's kind, which would be guessed wrong
// often: where decoding is cheap all rows are decoded, and plain ones add nothing by it.
template <int G, Rows kRows, Span kSpan>
__attribute__((always_inline)) inline void add_both(Accumulator<G>& accumulator, const Decoder& decoder, BagSum<G>& sum,
                                                    const typename Accumulator<G>::template Registers<kRows>& registers,
                                                    const uint8_t* weights, const Ring& ring, int64_t row,
                                                    int64_t stop) {
  int plain[kSegment];
  int transformed[Decoder::kIsCheap ? 1 : kSegment];
  int num_plain = 0;
  int num_transformed = 0;
  while (row < stop) {
    for (const int64_t part = std::min(stop, row + kBlock); row < part; ++row) {
      const int slot = static_cast<int>(row & (kRing - 1));
      fetch_row<Accumulator<G>::kLines>(weights, ring, static_cast<int>((row + kBlock) & (kRing - 1)));
      plain[num_plain] = slot;
      num_plain += ring.bits[slot] > 0;
      if (Decoder::kIsCheap) {
        decoder.template add<kSpan>(sum.components, weights, ring, slot);
      } else {
        transformed[num_transformed] = slot;
        num_transformed += ring.run[slot] != decoder.none();
      }
    }
    Decoder::join(sum.components, Decoder::Sum{});
  }
  for (int i = 0; i < num_plain;) {
    float scales = 0.0f;
    for (const int part = std::min(num_plain, i + kBlock); i < part; ++i) {
      accumulator.template add<kRows>(sum.plain, registers, weights, ring, plain[i]);
      if (kRows != Rows::Any) {
        scales += ring.scale[plain[i]];
      }
    }
    if (kRows != Rows::Any) {
      accumulator.template unbias<kRows>(sum.plain, scales);
    }
  }
  for (int i = 0; i < num_transformed; ++i) {
    decoder.template add<kSpan>(sum.components, weights, ring, transformed[i]);
  }
}

// Adds rows [row, stop) of a feature to a bag's sum.
template <int G, Rows kRows, Kinds kKinds, Span kSpan>
__attribute__((always_inline)) inline void add_rows(Accumulator<G>& accumulator, const Decoder& decoder,
                                                    BagSum<G>& sum,
                                                    const typename Accumulator<G>::template Registers<kRows>& registers,
                                                    const uint8_t* weights, const Ring& ring, int64_t row,
                                                    int64_t stop) {
  if (kKinds == Kinds::Both) {
    add_both<G, kRows, kSpan>(accumulator, decoder, sum, registers, weights, ring, row, stop);
    return;
  }
  while (row < stop) {
    const int64_t part = std::min(stop, row + kBlock);
    if (kKinds == Kinds::Plain) {
      add_plain<G, kRows>(accumulator, sum.plain, registers, weights, ring, row, part);
      row = part;
    } else {
      // Two sums, as each waits for its last addition.
      Decoder::Sum others{};
      const auto add = [&](int64_t i, Decoder::Sum& to) __attribute__((always_inline)) {
        fetch_row<kSpan == Span::Word ? 1 : 2>(weights, ring, static_cast<int>((i + kBlock) & (kRing - 1)));
        decoder.template add<kSpan>(to, weights, ring, static_cast<int>(i & (kRing - 1)));
      };
      for (; row + 2 <= part; row += 2) {
        add(row, sum.components);
        add(row + 1, others);
      }
      if (row < part) {
        add(row++, sum.components);
      }
      Decoder::join(sum.components, others);
    }
  }
}

// Adds the weights of rows [row, stop), which wrap around the ring; rows from `mixed_end` on weigh 1 each.
inline void add_weights_of(const Ring& ring, int64_t row, int64_t stop, int64_t mixed_end, float& kept, float& zero) {
  if (mixed_end <= row) {
    kept += static_cast<float>(stop - row);
    return;
  }
  const int slot = static_cast<int>(row & (kRing - 1));
  const int count = static_cast<int>(stop - row);
  add_weights(ring, slot, count, kept, zero);
}

// What a feature's bags have in common while they are pooled. Rows are counted from the feature's first.
struct Bags {
  const Lookup& lookup;
  const PackedTable& table;
  const Decoder& decoder;
  const Ring& ring;
  int64_t begin;      // the feature's first row in indices
  int64_t rows;
  int64_t last;       // the bag after the last one
  int64_t mixed_end;  // rows from here on are not mixed
  bool mean;
  int64_t bag;        // the next bag
  int64_t row;        // and its first row
  int64_t position;   // and where its embedding goes
};

template <int G, Kinds kKinds>
__attribute__((always_inline)) inline void clear(Accumulator<G>& accumulator, BagSum<G>& sum) {
  accumulator.clear(sum.plain);
  if (kKinds != Kinds::Plain) {
    sum.components = Decoder::Sum{};
  }
}

// Adds what transformed rows' components stand for to a bag's sum.
template <int G, Kinds kKinds>
__attribute__((always_inline)) inline void add_components(Accumulator<G>& accumulator, BagSum<G>& sum,
                                                          const PackedTable& table) {
  if (kKinds != Kinds::Plain) {
    alignas(64) float components[kMaxComponents];
    Decoder::store(sum.components, components);
    accumulator.add_components(sum.plain, components, table);
  }
}

inline float factor_of(const Bags& bags, int64_t count) {
  return bags.mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
}

// Pools bags of one segment as long as their rows end before `limit`; returns false at offsets that decrease or leave
// the rows. A function of its own, with nothing called between bags: what the loops need stays in registers.
template <int G, Rows kRows, Kinds kKinds, Span kSpan>
__attribute__((noinline)) bool pool_bags(Accumulator<G>& accumulator, Bags& bags, int64_t limit) {
  const typename Accumulator<G>::template Registers<kRows> registers;
  const Lookup& lookup = bags.lookup;
  const PackedTable& table = bags.table;
  const Ring& ring = bags.ring;
  const int64_t last = bags.last;
  int64_t bag = bags.bag;
  int64_t row = bags.row;
  int64_t position = bags.position;
  bool ordered = true;
  for (; bag < last; ++bag) {
    const int64_t offset = offset_at(lookup, bag + 1);
    if (__builtin_expect(offset < bags.begin + row || offset > bags.begin + bags.rows, 0)) {
      ordered = false;
      break;
    }
    const int64_t end = offset - bags.begin;
    // Long bags are added segment by segment always, so that where a range of bags begins changes no bit of a sum.
    if (end > limit || end - row > kSegment) {
      break;
    }
    fetch_output(lookup, table, position + 2 * lookup.output_stride);
    float kept = 0.0f;
    float zero = 0.0f;
    add_weights_of(ring, row, end, bags.mixed_end, kept, zero);
    BagSum<G> sum;
    clear<G, kKinds>(accumulator, sum);
    add_rows<G, kRows, kKinds, kSpan>(accumulator, bags.decoder, sum, registers, table.weights, ring, row, end);
    add_components<G, kKinds>(accumulator, sum, table);
    accumulator.finish(sum.plain, table, kept, zero, factor_of(bags, end - row), lookup.output, lookup.output_type,
                       position);
    row = end;
    position += lookup.output_stride;
  }
  bags.bag = bag;
  bags.row = row;
  bags.position = position;
  return ordered;
}

// Adds a segment of a bag that is longer than the ring to its sum.
template <int G, Rows kRows, Kinds kKinds, Span kSpan>
__attribute__((noinline)) void pool_segment(Accumulator<G>& accumulator, BagSum<G>& sum, const Bags& bags,
                                            int64_t stop) {
  const typename Accumulator<G>::template Registers<kRows> registers;
  BagSum<G> local = sum;
  add_rows<G, kRows, kKinds, kSpan>(accumulator, bags.decoder, local, registers, bags.table.weights, bags.ring,
                                    bags.row, stop);
  sum = local;
}

// The functions that pool a table's bags, by what is known of its rows.
template <int G>
struct Pooling {
  bool (*bags)(Accumulator<G>& accumulator, Bags& bags, int64_t limit);
  void (*segment)(Accumulator<G>& accumulator, BagSum<G>& sum, const Bags& bags, int64_t stop);

  template <Rows kRows, Kinds kKinds, Span kSpan>
  static Pooling of() {
    return {&pool_bags<G, kRows, kKinds, kSpan>, &pool_segment<G, kRows, kKinds, kSpan>};
  }
};

// A feature's bags [first, last), numbered among all features' bags.
template <int G, class Index>
void lookup_rows(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults, const Locator& locator,
                 const Decoder& decoder, Kinds kinds, const Pooling<G>& pooling) {
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
  Bags bags{lookup, table, decoder, ring, begin, rows, last, 0, feature.mean, first, 0,
            (first - f * lookup.batch) * lookup.output_stride + feature.column};
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
  int64_t located = 0;  // rows of the feature that are located
  const auto locate_until = [&](int64_t row) {
    while (located < std::min(row, rows)) {
      fetch_block(located + 2 * kBlock);
      resolve_block(located + kBlock);
      const int count = static_cast<int>(std::min<int64_t>(kBlock, rows - located));
      const float* weights = lookup.weights == nullptr ? nullptr : lookup.weights + begin + located;
      const Located found = locator.locate(weights, static_cast<int>(located % kRing), count, ring);
      located += count;
      if (found.mixed) {
        bags.mixed_end = located;
      }
      if (__builtin_expect(found.damaged, 0)) {
        faults.damaged_feature = f;
      }
    }
  };
  fetch_block(0);
  fetch_block(kBlock);
  resolve_block(0);

  Accumulator<G> accumulator(table.embedding_dim, table.blocks);
  while (bags.bag < last) {
    // Rows are fetched a block ahead of being read, so that the last block that is located is not read yet.
    locate_until(bags.row + kSegment + kBlock);
    const int64_t bag = bags.bag;
    const bool ordered = pooling.bags(accumulator, bags, located == rows ? rows : located - kBlock);
    if (__builtin_expect(!ordered, 0)) {
      faults.bad_offset = bags.bag;
      return;
    }
    if (bags.bag > bag) {
      continue;
    }
    // The bag is longer than a segment.
    const int64_t bag_begin = bags.row;
    const int64_t bag_end = offset_at(lookup, bag + 1) - begin;
    float kept = 0.0f;
    float zero = 0.0f;
    BagSum<G> sum;
    clear<G, Kinds::Both>(accumulator, sum);
    while (bags.row < bag_end) {
      const int64_t stop = std::min(bag_end, bags.row + kSegment);
      locate_until(stop + kBlock);
      add_weights_of(ring, bags.row, stop, bags.mixed_end, kept, zero);
      pooling.segment(accumulator, sum, bags, stop);
      bags.row = stop;
    }
    if (kinds != Kinds::Plain) {
      add_components<G, Kinds::Both>(accumulator, sum, table);
    }
    accumulator.finish(sum.plain, table, kept, zero, factor_of(bags, bag_end - bag_begin), lookup.output,
                       lookup.output_type, bags.position);
    bags.bag += 1;
    bags.position += lookup.output_stride;
  }
}

template <int G, Kinds kKinds, Span kSpan>
Pooling<G> pooling_of(Rows rows) {
  if constexpr (Accumulator<G>::kHasVariants && kKinds != Kinds::Transformed) {
    switch (rows) {
      case Rows::Any:
        break;
      case Rows::Narrow:
        return Pooling<G>::template of<Rows::Narrow, kKinds, kSpan>();
      case Rows::NarrowInLine:
        return Pooling<G>::template of<Rows::NarrowInLine, kKinds, kSpan>();
      case Rows::Bytes:
        return Pooling<G>::template of<kKinds == Kinds::Both ? Rows::Any : Rows::Bytes, kKinds, kSpan>();
    }
  }
  return Pooling<G>::template of<Rows::Any, kKinds, kSpan>();
}

template <int G>
Pooling<G> pooling_of(Rows rows, Kinds kinds, Span span) {
  const bool word = span == Span::Word;
  constexpr Span kWord = Decoder::kHasSpans ? Span::Word : Span::Bytes;
  switch (kinds) {
    case Kinds::Transformed:
      return word ? pooling_of<G, Kinds::Transformed, kWord>(rows)
                  : pooling_of<G, Kinds::Transformed, Span::Bytes>(rows);
    case Kinds::Both:
      return word ? pooling_of<G, Kinds::Both, kWord>(rows) : pooling_of<G, Kinds::Both, Span::Bytes>(rows);
    default:
      return pooling_of<G, Kinds::Plain, Span::Bytes>(rows);
  }
}

template <int G, class Index>
void lookup_feature(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  const PackedTable& table = *lookup.features[f].table;
  std::optional<CheckedRuns> coded;
  if (table.alpha == nullptr) {
    coded.emplace(table);
  }
  const CheckedRuns* runs = coded ? &*coded : nullptr;
  const Kinds kinds = coded ? coded->kinds() : Kinds::Plain;
  // Words are read without weights only.
  const Span span = coded && Decoder::kHasSpans && lookup.weights == nullptr ? coded->span() : Span::Bytes;
  const Locator locator(table, runs, span);
  const Decoder decoder(kinds == Kinds::Plain ? nullptr : runs, span);
  const Pooling<G> pooling = pooling_of<G>(locator.rows(), kinds, span);
  lookup_rows<G, Index>(lookup, f, first, last, faults, locator, decoder, kinds, pooling);
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
