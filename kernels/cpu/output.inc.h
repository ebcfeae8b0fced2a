// Storing pooled embeddings, one element at a time. Included inside a namespace and target region, after <cstring>.

inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fc0;
  }
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}

// Round to nearest even, subnormals included.
inline uint16_t to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000u;
  word &= 0x7fffffffu;
  if (word >= 0x47800000u) {  // 65536 and more, infinity, NaN
    return static_cast<uint16_t>(sign | (word > 0x7f800000u ? 0x7e00u : 0x7c00u));
  }
  if (word < 0x38800000u) {  // below the smallest normal half: let float addition round
    float magic;
    std::memcpy(&magic, &word, 4);
    magic += 0.5f;
    std::memcpy(&word, &magic, 4);
    return static_cast<uint16_t>(sign | (word - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((word - 0x38000000u + 0xfffu + (word >> 13 & 1)) >> 13));
}

inline void store_element(void* output, OutputType type, int64_t position, float value) {
  switch (type) {
    case OutputType::Float:
      static_cast<float*>(output)[position] = value;
      break;
    case OutputType::Half:
      static_cast<uint16_t*>(output)[position] = to_half(value);
      break;
    case OutputType::BFloat16:
      static_cast<uint16_t*>(output)[position] = to_bfloat16(value);
      break;
  }
}
