// Included inside an instruction set's namespace and target region, after <algorithm>, <cmath>, <cstring>, <vector> and
// the definition of uint64_t pack_block(uint64_t codes, int bits): 8 codes of a byte each to 8 * bits bits.

void pack_rows(const RowsToPack& all, int64_t first, int64_t last) {
  const int64_t blocks = (all.dim + 7) / 8;
  const int64_t row_bytes = blocks * all.bits;
  const float low = -static_cast<float>(1 << (all.bits - 1));
  const float high = -low - 1.0f;
  std::vector<int32_t> code_of(static_cast<size_t>(blocks) * 8);
  std::vector<uint8_t> codes(static_cast<size_t>(blocks) * 8);
  for (int64_t row = first; row < last; ++row) {
    const float* values = all.rows + row * all.dim;
    for (int64_t d = 0; d < all.dim; ++d) {
      // The division, and not a product with 1 / alpha: the codes must be those of training.
      float code = std::nearbyint((values[d] - all.beta[d]) / all.alpha);
      code = code < low ? low : code;
      code = code > high ? high : code;
      code_of[d] = static_cast<int32_t>(code - low);
    }
    for (int64_t d = 0; d < blocks * 8; ++d) {
      codes[d] = static_cast<uint8_t>(code_of[d]);
    }
    uint8_t* packed = all.packed + row * row_bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      uint64_t word;
      std::memcpy(&word, codes.data() + 8 * block, 8);
      word = pack_block(word, all.bits);
      uint8_t* target = packed + block * all.bits;
      // What is written beyond the block is overwritten by the next one; the range's last bytes belong to others.
      if (row + 1 < last && row_bytes >= 8) {
        std::memcpy(target, &word, 8);
      } else {
        std::memcpy(target, &word, all.bits);
      }
    }
  }
}
