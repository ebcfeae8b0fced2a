// The steps' work on a block of rows in plain C++, which compilers vectorize as far as an instruction set allows.
// Included inside a namespace and target region after packed_embedding_bag_ring.inc.h and directory_lines.inc.h.

constexpr int kFewRuns = 16;

// Where a block of rows lies, before it is checked against the weights.
struct Places {
  alignas(64) int64_t offset[kBlock];
  alignas(64) int32_t bits[kBlock];
};

inline void find_in_runs(const PackedTable& table, const int32_t* ranks, int count, Places& places) {
  int32_t run[kBlock] = {};
  if (table.num_runs <= kFewRuns) {
    for (int32_t k = 1; k < table.num_runs; ++k) {
      const int32_t start = table.run_starts[k];
      for (int i = 0; i < kBlock; ++i) {
        run[i] += ranks[i] >= start;
      }
    }
  } else {
    for (int i = 0; i < count; ++i) {
      run[i] = run_of(table, ranks[i]);
    }
  }
  for (int i = 0; i < count; ++i) {
    // A table without runs has no row of more than 0 bits.
    const RunRecord record = ranks[i] >= 0 && table.num_runs > 0 ? table.runs[run[i]] : RunRecord{0, 0, 0};
    // Unsigned, so that damaged records wrap around.
    const uint64_t bit = static_cast<uint64_t>(record.bit) +
                         static_cast<uint64_t>(std::max(ranks[i], 0)) * record.row_bits;
    places.bits[i] = static_cast<int32_t>(bit % 8 == 0 ? std::min<uint32_t>(record.coding, 15) : 15);
    places.offset[i] = static_cast<int64_t>(bit) >> 3;
  }
}

// What a rank's nibble line says of its row, its width and the widths before it; kWidthsBefore counts the latter.
template <uint32_t (*kWidthsBefore)(const uint8_t* line, int position)>
inline void find_in_nibbles(const PackedTable& table, const int32_t* ranks, int count, Places& places) {
  for (int i = 0; i < count; ++i) {
    const int32_t rank = std::max(ranks[i], 0);
    const int64_t line = std::min<int64_t>(rank / kNibbleRows, table.nibble_lines - 1);
    const uint8_t* bytes = table.nibbles + line * kLineBytes;
    const int position = rank % kNibbleRows;
    uint32_t base;
    std::memcpy(&base, bytes, 4);
    places.bits[i] = nibble_width(bytes, position);
    // A 0-bit row has no place; the sum before it may point past the last row.
    const int64_t unit = static_cast<int64_t>(base) + kWidthsBefore(bytes, position);
    places.offset[i] = places.bits[i] == 0 ? 0 : unit * table.blocks;
  }
}

// Fills the ring's slots from a block's places; a row that would leave the weights becomes one of 0 bits.
inline Located place(const PackedTable& table, const float* weights, int first, int count, const Places& places,
                     Ring& ring) {
  Located found{false, false};
  for (int i = 0; i < count; ++i) {
    const int slot = first + i;
    const int32_t rank = ring.rank[slot];
    const int bits = places.bits[i];
    const int64_t offset = places.offset[i];
    const int64_t row_bytes = static_cast<int64_t>(table.blocks) * bits;
    const bool inside = bits <= kMaxBits && offset >= 0 && offset <= table.weights_bytes - kEndPadding - row_bytes;
    const bool stored = inside && bits > 0 && rank >= 0;
    const float weight = rank == kPruned ? 0.0f : weights != nullptr ? weights[i] : 1.0f;
    ring.start[slot] = stored ? offset : 0;
    // Blocks are read as words of 8 bytes, the last one beyond the row's end.
    ring.last[slot] = stored ? offset + row_bytes - bits + 7 : 0;
    ring.bits[slot] = stored ? bits : 0;
    ring.scale[slot] = stored ? weight * table.alpha[bits] : 0.0f;
    ring.kept[slot] = stored ? weight : 0.0f;
    ring.zero[slot] = stored ? 0.0f : weight;
    found.mixed |= !stored || weights != nullptr;
    found.damaged |= !inside && rank >= 0;
  }
  return found;
}

template <class Index>
int resolve_ids_generic(const Index* ids, int count, int64_t num_rows, int32_t* ranks) {
  int bad = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t id = ids[i];
    const bool inside = static_cast<uint64_t>(id) < static_cast<uint64_t>(num_rows);
    const bool pruned = id == -1;
    bad += !inside & !pruned;
    ranks[i] = pruned ? kPruned : inside ? static_cast<int32_t>(id) : 0;
  }
  return bad;
}
