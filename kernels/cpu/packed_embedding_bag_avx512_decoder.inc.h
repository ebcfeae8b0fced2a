// Decoding transformed rows with AVX-512 VBMI: all components of a row are cut out by one multishift. Included by
// packed_embedding_bag_avx512.cpp, after packed_embedding_bag_coding.inc.h.

// Adds up the components of transformed rows.
//
// Codes are moved to the upper bits of the mantissas of 16 words: under the exponent of 1 they are 1 + code / 2^bits,
// precise enough to be summed as they are; offsets take away what is too much. If a row lies in 8 bytes, those are in
// every lane, and its first bit is bit `shift` of them. Else it lies in 32 bytes, from byte `position` and bit `shift`
// on, and `permute` brings the first bytes of components 2 i and 2 i + 1 to lane i. Both numbers are in every byte of
// the ring's words.
class Decoder {
 public:
  static constexpr bool kHasSpans = true;
  static constexpr bool kIsCheap = true;

  struct Sum {
    __m512 scaled;
    __m512 offsets;
  };

  // Without runs there is no transformed row. Span::Word is for rows that weigh 1 each.
  Decoder(const CheckedRuns* runs, Span span)
      : none_(runs == nullptr ? 0 : runs->none()), runs_(runs == nullptr ? 0 : none_ + 1) {
    for (int32_t k = 0; k < static_cast<int32_t>(runs_.size()); ++k) {
      fill((*runs)[k], span, runs_[k]);
    }
  }

  // What Ring::run is of rows that are not transformed.
  int32_t none() const {
    return none_ * kRunBytes;
  }

  template <Span kSpan>
  __attribute__((always_inline)) void add(Sum& sum, const uint8_t* weights, const Ring& ring, int slot) const {
    const uint32_t at = static_cast<uint32_t>(ring.run[slot]);
    const Run& run = *reinterpret_cast<const Run*>(reinterpret_cast<const char*>(runs_.data()) + at);
    const uint8_t* start = weights + ring.start[slot];
    const __m512i shift = _mm512_add_epi8(_mm512_load_si512(run.shift), _mm512_set1_epi32(ring.shift[slot]));
    __m512i words;
    if constexpr (kSpan == Span::Word) {
      int64_t row;
      std::memcpy(&row, start, 8);
      words = _mm512_set1_epi64(row);
    } else {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
      const __m512i permute = _mm512_add_epi8(_mm512_load_si512(run.permute), _mm512_set1_epi32(ring.position[slot]));
      words = _mm512_permutexvar_epi8(permute, _mm512_castsi256_si512(row));
    }
    words = _mm512_multishift_epi64_epi8(shift, words);
    // 1.0f | (words & mask)
    words = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0x3f800000), _mm512_load_si512(run.mask), 0xec);
    const __m512 codes = _mm512_castsi512_ps(words);
    if constexpr (kSpan == Span::Word) {
      sum.scaled = _mm512_fmadd_ps(codes, _mm512_load_ps(run.scale), sum.scaled);
      sum.offsets = _mm512_add_ps(sum.offsets, _mm512_load_ps(run.offset));
    } else {
      const __m512 values = _mm512_fmadd_ps(codes, _mm512_load_ps(run.scale), _mm512_load_ps(run.offset));
      sum.scaled = _mm512_fmadd_ps(values, _mm512_set1_ps(ring.weight[slot]), sum.scaled);
    }
  }

  // Adds another sum. Every few rows: offsets that had grown with the whole bag would take the sum's last digits with
  // them.
  __attribute__((always_inline)) static void join(Sum& sum, const Sum& other) {
    sum.scaled = _mm512_add_ps(_mm512_add_ps(sum.scaled, other.scaled), _mm512_add_ps(sum.offsets, other.offsets));
    sum.offsets = _mm512_setzero_ps();
  }

  __attribute__((always_inline)) static void store(const Sum& sum, float* components) {
    _mm512_store_ps(components, sum.scaled);
  }

 private:
  struct Run {
    alignas(64) uint8_t permute[64];
    alignas(64) uint8_t shift[64];
    alignas(64) uint32_t mask[kMaxComponents];
    alignas(64) float scale[kMaxComponents];
    alignas(64) float offset[kMaxComponents];
  };

 public:
  static constexpr int32_t kRunBytes = sizeof(Run);  // Ring::run counts them

 private:
  static void fill(const CheckedRun& checked, Span span, Run& run) {
    int bit = 0;
    int level = 0;
    int lane_byte = 0;
    for (int c = 0; c < kMaxComponents; ++c) {
      lane_byte = span == Span::Word ? 0 : c % 2 == 0 ? bit / 8 : lane_byte;
      const int width = checked.widths[c];
      for (int byte = 0; byte < 4; ++byte) {
        run.permute[4 * c + byte] = static_cast<uint8_t>(lane_byte + c % 2 * 4 + byte);
        // A code's lowest bit goes to bit 23 - width of its word; shifts are taken modulo 64.
        run.shift[4 * c + byte] = static_cast<uint8_t>((bit - 8 * lane_byte + 8 * byte - (23 - width)) & 63);
      }
      bit += width;
      run.mask[c] = ((1u << width) - 1) << (23 - width);
      run.scale[c] = 0.0f;
      run.offset[c] = 0.0f;
      if (width > 0) {
        run.scale[c] = static_cast<float>(1 << width) * from_bfloat16(checked.levels[level++]);
        run.offset[c] = from_bfloat16(checked.levels[level++]) - run.scale[c];
      }
    }
  }

  int32_t none_;
  std::vector<Run> runs_;
};
