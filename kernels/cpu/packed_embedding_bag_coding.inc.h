// What the run records of a table say, checked. Included inside an instruction set's namespace, after
// packed_embedding_bag_ring.inc.h and directory_lines.inc.h.

inline float from_bfloat16(uint16_t word) {
  const uint32_t bits = static_cast<uint32_t>(word) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A run of plain rows, or of transformed ones. A run that is not sound has rows of 0 bits, and none may be read.
struct CheckedRun {
  int64_t bit = 0;        // where rank 0 would lie, counted from the table's `weights`
  int32_t row_bits = 0;
  int32_t bits = 0;       // of an element of a plain row
  float step = 0.0f;      // between the levels of a plain row
  bool transformed = false;
  bool sound = true;
  uint8_t widths[kMaxComponents] = {};  // of the components of a transformed row
  const uint16_t* levels = nullptr;     // bfloat16 scale and offset of each that has bits
};

// Judges run k's record alone: not whether its rows lie in the weights. `level` is where its levels start, and then
// where the next run's do.
inline CheckedRun check_run(const PackedTable& table, int32_t k, int64_t& level) {
  const RunRecord& record = table.runs[k];
  const bool coded = table.alpha == nullptr;
  const int64_t first_level = level;
  int64_t row_bits = 0;
  CheckedRun run;
  run.bit = static_cast<int64_t>(static_cast<uint64_t>(record.bit) + 8 * static_cast<uint64_t>(table.first_byte));
  if (record.coding & kTransformed) {
    run.transformed = true;
    run.sound = coded && (record.coding & ~kTransformed) >> (4 * kComponentBlocks) == 0;
    for (int block = 0; block < kComponentBlocks; ++block) {
      const uint8_t width = record.coding >> (4 * block) & 15;
      run.sound &= width <= kMaxBits;
      for (int c = block < 2 ? block : 1 << (block - 1); c < std::min(1 << block, table.components); ++c) {
        run.widths[c] = width;
        row_bits += width;
        level += width > 0 ? 2 : 0;
      }
    }
  } else if (record.coding != 0) {
    run.sound = record.coding <= kMaxBits;
    run.bits = run.sound ? static_cast<int32_t>(record.coding) : 0;
    row_bits = int64_t{8} * table.blocks * run.bits;
    level += coded ? 1 : 0;
  }
  run.sound &= !coded || level <= table.num_levels;
  run.sound &= record.coding == 0 || record.row_bits == row_bits;
  if (!run.sound) {
    run = CheckedRun{};
    run.sound = false;
    // Where the levels of the runs behind it start is not known.
    level = table.num_levels + 1;
    return run;
  }
  run.row_bits = static_cast<int32_t>(row_bits);
  run.levels = run.transformed ? table.levels + first_level : nullptr;
  if (run.bits > 0) {
    run.step = coded ? from_bfloat16(table.levels[first_level]) : table.alpha[run.bits];
  }
  return run;
}

// The runs of a coded table.
class CheckedRuns {
 public:
  explicit CheckedRuns(const PackedTable& table) : runs_(table.num_runs + 1) {
    int64_t level = 0;
    for (int32_t k = 0; k < table.num_runs; ++k) {
      runs_[k] = check_run(table, k, level);
      transformed_ |= runs_[k].transformed;
      wide_ |= runs_[k].transformed && !lies_in_words(runs_[k]);
      plain_ |= runs_[k].bits > 0;
    }
  }

  // The index of a run of no table: plain, of 0 bits.
  int32_t none() const {
    return static_cast<int32_t>(runs_.size()) - 1;
  }

  const CheckedRun& operator[](int32_t run) const {
    return runs_[run];
  }

  Span span() const {
    return wide_ ? Span::Bytes : Span::Word;
  }

  Kinds kinds() const {
    return !transformed_ ? Kinds::Plain : plain_ ? Kinds::Both : Kinds::Transformed;
  }

 private:
  // Whether each row lies in the 8 bytes from its first one on.
  static bool lies_in_words(const CheckedRun& run) {
    const uint64_t row_starts = static_cast<uint64_t>(run.bit) | static_cast<uint64_t>(run.row_bits) | 8;
    const int last_start = 8 - static_cast<int>(row_starts & -row_starts);  // of a row in its first byte
    return run.row_bits + last_start <= 64;
  }

  std::vector<CheckedRun> runs_;
  bool wide_ = false;
  bool transformed_ = false;
  bool plain_ = false;
};

// Where a block of rows lies, found in checked runs. Rows that are not read are of the run none().
struct CheckedPlaces {
  alignas(64) int64_t bit[kBlock];
  alignas(64) int32_t run[kBlock];
  bool damaged;
};

inline void find_in_checked_runs(const PackedTable& table, const CheckedRuns& runs, const int32_t* ranks, int count,
                                 CheckedPlaces& places) {
  places.damaged = false;
  const uint64_t end = 8 * static_cast<uint64_t>(table.weights_bytes - kEndPadding);
  for (int i = 0; i < count; ++i) {
    const bool has_run = ranks[i] >= 0 && table.num_runs > 0;
    const int32_t index = has_run ? run_of(table, ranks[i]) : runs.none();
    const CheckedRun& run = runs[index];
    // Unsigned, so that damaged records wrap around.
    const uint64_t bit = static_cast<uint64_t>(run.bit) +
                         static_cast<uint64_t>(std::max(ranks[i], 0)) * static_cast<uint64_t>(run.row_bits);
    const bool stored = run.transformed || run.bits > 0;
    const bool inside = run.sound && (!stored || (bit <= end && static_cast<uint64_t>(run.row_bits) <= end - bit &&
                                                  (run.transformed || bit % 8 == 0)));
    places.bit[i] = inside && stored ? static_cast<int64_t>(bit) : 0;
    places.run[i] = inside && stored ? index : runs.none();
    places.damaged |= !inside;
  }
}
