// Reading a directory, one row at a time. Included inside an instruction set's namespace, after <cstring> and
// low_bits(word, count): the lowest `count` bits of a word, none if count < 0, all if it is above 63.

inline uint64_t load_u64(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// The set bits before one of a bitmap's line in all lines; in the highest bit whether that one is set.
inline uint32_t bitmap_bits(const uint8_t* line, int bit) {
  const uint8_t* words = line + 8;
  uint64_t rank = load_u64(line);
#pragma GCC unroll 7
  for (int k = 0; k < 7; ++k) {
    uint64_t before = low_bits(load_u64(words + 8 * k), bit - 64 * k);
#if defined(__x86_64__)
    asm("" : "+r"(before));  // else all seven become a vector, whose bits take longer to count
#endif
    rank += __builtin_popcountll(before);
  }
  const uint32_t present = load_u64(words + bit / 64 * 8) >> (bit % 64) & 1;
  return (static_cast<uint32_t>(rank) & 0x7fffffffu) | present << 31;
}

// Rank among the kept rows of a table's bitmap, or kZeroBits.
inline int32_t bitmap_rank(const uint8_t* directory, int32_t row) {
  const uint32_t found = bitmap_bits(directory + row / kBitmapRows * kLineBytes, static_cast<int>(row % kBitmapRows));
  return found >> 31 != 0 ? static_cast<int32_t>(found & 0x7fffffffu) : kZeroBits;
}

// Sum of the widths of the rows before `position` in a nibble line.
inline uint32_t widths_before(const uint8_t* line, int position) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
  uint64_t sum = 0;
  // Widths follow the 4 bytes of base: nibble 8 + j of the line is row j. They are counted with it.
  const int nibbles = position + 8;
  for (int k = 0; k < 8; ++k) {
    const int here = nibbles - 16 * k;
    uint64_t word = here >= 16 ? ~0ull : here <= 0 ? 0 : (1ull << (4 * here)) - 1;
    word &= k == 0 ? load_u64(line) & 0xffffffff00000000ull : load_u64(line + 8 * k);
    sum += (((word & kLow) + (word >> 4 & kLow)) * 0x0101010101010101ull) >> 56;
  }
  return static_cast<uint32_t>(sum);
}

inline int nibble_width(const uint8_t* line, int position) {
  return line[4 + position / 2] >> (position % 2 * 4) & 15;
}

// The last run that starts at or before a rank.
inline int32_t run_of(const PackedTable& table, int32_t rank) {
  const int32_t* starts = table.run_starts;
  int32_t low = 0;
  for (int32_t count = table.num_runs; count > 1;) {
    const int32_t half = count / 2;
    low += starts[low + half] <= rank ? half : 0;
    count -= half;
  }
  return low;
}
