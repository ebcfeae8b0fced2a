// The steps' work on a block of rows with AVX-512, 8 or 16 rows at a time. Included by packed_embedding_bag_avx512.cpp,
// after packed_embedding_bag_steps.inc.h.

int resolve_ids(const int64_t* ids, int count, int64_t num_rows, int32_t* ranks) {
  const __m512i rows = _mm512_set1_epi64(num_rows);
  const __m512i pruned_id = _mm512_set1_epi64(-1);
  int bad = 0;
  for (int i = 0; i < count; i += 8) {
    const __mmask8 live = count - i >= 8 ? 0xff : static_cast<__mmask8>((1u << (count - i)) - 1);
    const __m512i id = _mm512_maskz_loadu_epi64(live, ids + i);
    const __mmask8 inside = _mm512_cmplt_epu64_mask(id, rows);
    const __mmask8 pruned = _mm512_cmpeq_epi64_mask(id, pruned_id);
    bad += __builtin_popcount(live & static_cast<unsigned>(~inside & ~pruned & 0xff));
    const __m512i rank = _mm512_mask_mov_epi64(_mm512_maskz_mov_epi64(inside, id), pruned, pruned_id);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ranks + i), _mm512_cvtepi64_epi32(rank));
  }
  return bad;
}

int resolve_ids(const int32_t* ids, int count, int64_t num_rows, int32_t* ranks) {
  const __m512i rows = _mm512_set1_epi32(static_cast<int32_t>(num_rows));
  const __m512i pruned_id = _mm512_set1_epi32(-1);
  int bad = 0;
  for (int i = 0; i < count; i += 16) {
    const __mmask16 live = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m512i id = _mm512_maskz_loadu_epi32(live, ids + i);
    const __mmask16 inside = _mm512_cmplt_epu32_mask(id, rows);
    const __mmask16 pruned = _mm512_cmpeq_epi32_mask(id, pruned_id);
    bad += __builtin_popcount(live & static_cast<unsigned>(~inside & ~pruned & 0xffff));
    const __m512i rank = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(inside, id), pruned, pruned_id);
    _mm512_storeu_si512(ranks + i, rank);
  }
  return bad;
}

// Sum of the widths of the rows before `position` in a nibble line, whose first 4 bytes are no widths.
inline uint32_t widths_before_512(const uint8_t* line, int position) {
  const __m512i bytes = _mm512_loadu_si512(line);
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const uint64_t whole = ((1ull << (position / 2)) - 1) << 4;        // bytes of which both rows come before
  const uint64_t lower = ((1ull << ((position + 1) / 2)) - 1) << 4;  // and of which the lower one does
  const __m512i low = _mm512_maskz_mov_epi8(lower, _mm512_and_si512(bytes, low_nibble));
  const __m512i high = _mm512_maskz_mov_epi8(whole, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_nibble));
  const __m512i sums = _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
  return static_cast<uint32_t>(_mm512_reduce_add_epi64(sums));
}

inline __mmask16 live_of(int left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

// Ranks to rows, 16 at a time. A table's few runs are checked once and kept in registers' shape: a rank's run is the
// number of starts at or before it, and a permutation by that number gives what is known of the run. Plain rows of up
// to kFewRuns runs go a way of their own.
class Locator {
 public:
  // `runs` are the table's if it is coded, else null.
  Locator(const PackedTable& table, const CheckedRuns* runs, Span span)
      : table_(table), runs_(runs), word_(span == Span::Word) {
    coded_ = runs != nullptr && (runs->kinds() != Kinds::Plain || table.num_runs > kFewRuns);
    // A bitmap's ranks are as good as its lines: they are checked one by one.
    few_runs_ = (table.kind == Directory::Ranked || table.kind == Directory::Remap) && table.num_runs > 0 &&
                table.num_runs <= (coded_ ? kRunsInRegisters : kFewRuns);
    if (table.alpha != nullptr) {
      std::copy_n(table.alpha, kMaxBits + 1, alpha_);
    }
    if (table.blocks <= 2) {
      rows_ = Rows::Narrow;  // 16 elements take the bias at any width
    }
    // Only if runs start in order does a rank's run end behind it.
    for (int32_t k = 1; few_runs_ && k < table.num_runs; ++k) {
      few_runs_ = table.run_starts[k] >= (k == 1 ? 0 : table.run_starts[k - 1]);
    }
    if (coded_) {
      has_plain_ = runs->kinds() != Kinds::Transformed;
    }
    if (few_runs_) {
      check_runs();
    }
    // A code with the bias is 2^(7 - bits) times itself.
    if (rows_ != Rows::Any && rows_ != Rows::Bytes) {
      for (int bits = 0; bits <= kMaxBits; ++bits) {
        alpha_[bits] = std::ldexp(alpha_[bits], bits - 7);
      }
      for (int k = 0; few_runs_ && k < table.num_runs; ++k) {
        steps_[k] = std::ldexp(steps_[k], (kinds_[k] & 15) - 7);
      }
    }
    if (few_runs_ && (coded_ || table.num_runs > kFewSteps)) {
      const int stride = table.num_runs <= 16 ? 1 : 4;
      for (int k = 0; k < kRunsInRegisters; ++k) {
        search_[k % stride * 16 + k / stride] = k == 0 ? 0 : k < table.num_runs ? table.run_starts[k] : INT32_MAX;
        if (stride == 1 && k == 15) {
          break;
        }
      }
    }
  }

  Rows rows() const {
    return rows_;
  }

  Located locate(const float* weights, int first, int count, Ring& ring) const {
    if (coded_) {
      return locate_coded(weights, first, count, ring);
    }
    if (few_runs_) {
      return weights == nullptr ? locate_few<false>(weights, first, count, ring)
                                : locate_few<true>(weights, first, count, ring);
    }
    if (runs_ != nullptr) {
      return locate_checked(weights, first, count, ring);
    }
    Places places;
    if (table_.nibble_lines > 0) {
      find_in_nibbles<widths_before_512>(table_, ring.rank + first, count, places);
    } else {
      find_in_runs(table_, ring.rank + first, count, places);
    }
    Located found{false, false};
    for (int i = 0; i < count; i += 16) {
      const __mmask16 live = live_of(count - i);
      const __m512i rank = _mm512_load_si512(ring.rank + first + i);
      const __m512i bits = _mm512_load_si512(places.bits + i);
      const __m512i low = _mm512_load_si512(places.offset + i);
      const __m512i high = _mm512_load_si512(places.offset + i + 8);
      const __m512i row_bytes = _mm512_mullo_epi32(bits, _mm512_set1_epi32(table_.blocks));
      const __mmask16 inside = _mm512_cmple_epu32_mask(bits, _mm512_set1_epi32(kMaxBits)) &
                               (inside_8(low, _mm512_castsi512_si256(row_bytes)) |
                                inside_8(high, _mm512_extracti64x4_epi64(row_bytes, 1)) << 8);
      const __mmask16 row = _mm512_cmpge_epi32_mask(rank, _mm512_setzero_si512());
      found.damaged |= (row & live & static_cast<__mmask16>(~inside)) != 0;
      found.mixed |= put_16<true>(weights == nullptr ? nullptr : weights + i, first + i, live, rank,
                                  row & inside & _mm512_test_epi32_mask(bits, bits), low, high, bits,
                                  _mm512_permutexvar_ps(bits, _mm512_load_ps(alpha_)), ring);
    }
    return found;
  }

 private:
  static constexpr int kRunsInRegisters = 64;
  static constexpr int kFewSteps = 6;             // runs that are found faster one by one than by halves
  static constexpr int32_t kIsTransformed = 256;  // in kinds_

  // What is known of each of few runs, and of the table's rows from that.
  void check_runs() {
    const PackedTable& table = table_;
    bool in_line = table.blocks % 8 == 0 || 8 % table.blocks == 0;
    bool bytes = true;
    bool narrow = true;
    const int64_t limit = 8 * (table.weights_bytes - kEndPadding);
    for (int k = 0; k < table.num_runs; ++k) {
      CheckedRun run;
      if (runs_ != nullptr) {
        run = (*runs_)[k];
      } else {
        int64_t level = 0;
        run = check_run(table, k, level);
      }
      const int64_t first = k == 0 ? 0 : table.run_starts[k];
      const int64_t end = k + 1 < table.num_runs ? table.run_starts[k + 1] : table.num_rows;
      if (k < kFewRuns) {
        starts_[k] = static_cast<int32_t>(first);
      }
      damaged_ |= !run.sound;
      bytes &= run.sound && run.bits == kMaxBits;
      if (!run.sound || (run.bits == 0 && !run.transformed)) {
        continue;
      }
      // Bits within the limit's square cannot overflow when ranks below 2^31 are added.
      const int64_t row_bits = run.row_bits;
      const bool inside = first <= end && end <= table.num_rows && run.bit >= -limit - row_bits * table.num_rows &&
                          run.bit <= limit && run.bit + first * row_bits >= 0 && run.bit + end * row_bits <= limit &&
                          (run.transformed || run.bit % 8 == 0);
      damaged_ |= !inside;
      bytes &= inside;  // then the table is long enough to read a whole row from its first byte
      if (!inside) {
        in_line = false;
        continue;
      }
      // No group of 64 elements of a row crosses a line if their bytes divide it and what lies before them.
      const int64_t group_bits = 8 * std::min(table.blocks, 8) * run.bits;
      in_line &= run.transformed ||
                 ((run.bits & (run.bits - 1)) == 0 && (run.bit + first * row_bits) % group_bits == 0);
      narrow &= run.bits < kMaxBits;
      far_ |= run.bit + end * row_bits > int64_t{UINT32_MAX};
      bits_[k] = run.bit;
      low_bits_[k] = static_cast<int32_t>(static_cast<uint32_t>(run.bit));
      row_bits_[k] = run.row_bits;
      kinds_[k] = run.transformed ? kIsTransformed : run.bits;
      steps_[k] = run.step;
    }
    if (table.blocks > 2) {
      rows_ = bytes ? Rows::Bytes : !narrow ? Rows::Any : in_line ? Rows::NarrowInLine : Rows::Narrow;
    }
  }

  int inside_8(__m512i offset, __m256i row_bytes) const {
    const __m512i limit = _mm512_set1_epi64(table_.weights_bytes - kEndPadding);
    const __m512i last = _mm512_sub_epi64(limit, _mm512_cvtepu32_epi64(row_bytes));
    return _mm512_cmple_epi64_mask(offset, last) & _mm512_cmpge_epi64_mask(offset, _mm512_setzero_si512());
  }

  template <bool kWeighted>
  Located locate_few(const float* weights, int first, int count, Ring& ring) const {
    const __m512i starts = _mm512_load_si512(starts_);
    const __m512i offsets_low = _mm512_srai_epi64(_mm512_load_si512(bits_), 3);
    const __m512i offsets_high = _mm512_srai_epi64(_mm512_load_si512(bits_ + 8), 3);
    const __m512i widths = _mm512_load_si512(kinds_);
    const __m512 steps = _mm512_load_ps(steps_);
    Located found{damaged_, false};
    for (int i = 0; i < count; i += 16) {
      const __m512i rank = _mm512_load_si512(ring.rank + first + i);
      __m512i run = _mm512_setzero_si512();
      if (table_.num_runs > kFewSteps) {
        run = runs_of<1>(rank);
      } else {
        for (int k = 1; k < table_.num_runs; ++k) {
          const __m512i start = _mm512_permutexvar_epi32(_mm512_set1_epi32(k), starts);
          run = _mm512_mask_add_epi32(run, _mm512_cmpge_epi32_mask(rank, start), run, _mm512_set1_epi32(1));
        }
      }
      const __m512i bits = _mm512_permutexvar_epi32(run, widths);
      const __m512i row_bytes = _mm512_mullo_epi32(bits, _mm512_set1_epi32(table_.blocks));
      const auto offset_8 = [&](__m256i run_8, __m256i size_8, __m256i rank_8) {
        const __m512i base = _mm512_permutex2var_epi64(offsets_low, _mm512_cvtepu32_epi64(run_8), offsets_high);
        const __m512i rows = _mm512_mul_epu32(_mm512_cvtepu32_epi64(rank_8), _mm512_cvtepu32_epi64(size_8));
        return _mm512_add_epi64(base, rows);
      };
      const __m512i low =
          offset_8(_mm512_castsi512_si256(run), _mm512_castsi512_si256(row_bytes), _mm512_castsi512_si256(rank));
      const __m512i high = offset_8(_mm512_extracti64x4_epi64(run, 1), _mm512_extracti64x4_epi64(row_bytes, 1),
                                    _mm512_extracti64x4_epi64(rank, 1));
      const __mmask16 row = _mm512_cmpge_epi32_mask(rank, _mm512_setzero_si512());
      found.mixed |= put_16<kWeighted>(kWeighted ? weights + i : nullptr, first + i, live_of(count - i), rank,
                                       row & _mm512_test_epi32_mask(bits, bits), low, high, bits,
                                       _mm512_permutexvar_ps(run, steps), ring);
    }
    return found;
  }

  // Rows of checked runs that are not few, whose rows may lie outside the weights.
  Located locate_checked(const float* weights, int first, int count, Ring& ring) const {
    CheckedPlaces places;
    find_in_checked_runs(table_, *runs_, ring.rank + first, count, places);
    alignas(64) int32_t kinds[kBlock] = {};
    alignas(64) int32_t row_bits[kBlock] = {};
    alignas(64) float steps[kBlock];
    for (int i = 0; i < count; ++i) {
      const CheckedRun& run = (*runs_)[places.run[i]];
      kinds[i] = run.transformed ? kIsTransformed : run.bits;
      row_bits[i] = places.run[i] == runs_->none() ? 0 : run.row_bits;
      steps[i] = rows_ == Rows::Any ? run.step : std::ldexp(run.step, run.bits - 7);
    }
    bool mixed = false;
    for (int i = 0; i < count; i += 16) {
      const __m512i low = _mm512_load_si512(places.bit + i);
      const __m512i high = _mm512_load_si512(places.bit + i + 8);
      const __m512i bit = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)),
                                             _mm512_cvtepi64_epi32(high), 1);
      const Coded rows{_mm512_load_si512(places.run + i), _mm512_load_si512(kinds + i),
                       _mm512_load_si512(row_bits + i),   _mm512_load_ps(steps + i),
                       bit,                               _mm512_srli_epi64(low, 3),
                       _mm512_srli_epi64(high, 3)};
      const float* of_rows = weights == nullptr ? nullptr : weights + i;
      mixed |= word_ ? put_coded_16<true, true>(of_rows, first + i, live_of(count - i), rows, ring)
                     : put_coded_16<true, false>(of_rows, first + i, live_of(count - i), rows, ring);
    }
    return {places.damaged, mixed};
  }

  Located locate_coded(const float* weights, int first, int count, Ring& ring) const {
    if (!few_runs_) {
      return locate_checked(weights, first, count, ring);
    }
    return table_.num_runs <= 16   ? locate_kinds<1>(weights, first, count, ring)
           : table_.num_runs <= 32 ? locate_kinds<2>(weights, first, count, ring)
                                   : locate_kinds<4>(weights, first, count, ring);
  }

  template <int kRegisters>
  __attribute__((always_inline)) Located locate_kinds(const float* weights, int first, int count, Ring& ring) const {
    if (has_plain_) {
      return word_ ? locate_in_registers<kRegisters, true, true>(weights, first, count, ring)
                   : locate_in_registers<kRegisters, true, false>(weights, first, count, ring);
    }
    return word_ ? locate_in_registers<kRegisters, false, true>(weights, first, count, ring)
                 : locate_in_registers<kRegisters, false, false>(weights, first, count, ring);
  }

  // The entries of 16 runs in a table of up to 16 * kRegisters.
  template <int kRegisters>
  __attribute__((always_inline)) static __m512i of_runs(const int32_t* table, __m512i run) {
    const auto part = [&](int k) { return _mm512_load_si512(table + 16 * k); };
    if constexpr (kRegisters == 1) {
      return _mm512_permutexvar_epi32(run, part(0));
    } else {
      const __m512i low = _mm512_permutex2var_epi32(part(0), run, part(1));
      if constexpr (kRegisters == 2) {
        return low;
      } else {
        const __m512i high = _mm512_permutex2var_epi32(part(2), run, part(3));
        return _mm512_mask_mov_epi32(low, _mm512_test_epi32_mask(run, _mm512_set1_epi32(32)), high);
      }
    }
  }

  // The run of each rank: among 16 starts by halves, and then, if each stands for four, among those.
  template <int kRegisters>
  __attribute__((always_inline)) __m512i runs_of(__m512i rank) const {
    const __m512i coarse = _mm512_load_si512(search_);
    __m512i run = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int step = 8; step > 0; step /= 2) {
      if (kRegisters == 2 && step == 8) {
        continue;  // up to 32 starts are four for each of 8
      }
      const __m512i next = _mm512_or_si512(run, _mm512_set1_epi32(step));
      run = _mm512_mask_mov_epi32(run, _mm512_cmpge_epi32_mask(rank, _mm512_permutexvar_epi32(next, coarse)), next);
    }
    if constexpr (kRegisters > 1) {
      const __m512i one = _mm512_set1_epi32(1);
      __m512i fine = _mm512_slli_epi32(run, 2);
#pragma GCC unroll 3
      for (int k = 1; k < 4; ++k) {
        const __m512i start = _mm512_permutexvar_epi32(run, _mm512_load_si512(search_ + 16 * k));
        fine = _mm512_mask_add_epi32(fine, _mm512_cmpge_epi32_mask(rank, start), fine, one);
      }
      run = fine;
    }
    return run;
  }

  template <int kRegisters, bool kPlain, bool kWord>
  __attribute__((noinline)) Located locate_in_registers(const float* weights, int first, int count, Ring& ring) const {
    bool mixed = false;
    for (int i = 0; i < count; i += 16) {
      const __m512i rank = _mm512_load_si512(ring.rank + first + i);
      const __m512i run = runs_of<kRegisters>(rank);
      const __m512i row_bits = of_runs<kRegisters>(row_bits_, run);
      const __m512i bit =
          _mm512_add_epi32(of_runs<kRegisters>(low_bits_, run), _mm512_mullo_epi32(rank, row_bits));
      // Bits of small tables do not need more than 32.
      const __m512i byte = _mm512_srli_epi32(bit, 3);
      __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(byte));
      __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(byte, 1));
      if (__builtin_expect(far_, 0)) {
        low = far_bytes(_mm512_castsi512_si256(run), _mm512_castsi512_si256(rank), _mm512_castsi512_si256(row_bits));
        high = far_bytes(_mm512_extracti64x4_epi64(run, 1), _mm512_extracti64x4_epi64(rank, 1),
                         _mm512_extracti64x4_epi64(row_bits, 1));
      }
      __m512 steps = _mm512_setzero_ps();
      if (kPlain) {
        steps = _mm512_castsi512_ps(of_runs<kRegisters>(reinterpret_cast<const int32_t*>(steps_), run));
      }
      mixed |= put_coded_16<kPlain, kWord>(weights == nullptr ? nullptr : weights + i, first + i, live_of(count - i),
                                           {run, of_runs<kRegisters>(kinds_, run), row_bits, steps, bit, low, high},
                                           ring);
    }
    return {damaged_, mixed};
  }

  __m512i far_bytes(__m256i run, __m256i rank, __m256i row_bits) const {
    const __m512i rows = _mm512_mul_epu32(_mm512_cvtepu32_epi64(rank), _mm512_cvtepu32_epi64(row_bits));
    return _mm512_srli_epi64(_mm512_add_epi64(_mm512_i32gather_epi64(run, bits_, 8), rows), 3);
  }

  // What is known of 16 rows of checked runs; of rows that are not read everything but the run is 0, or the rank < 0.
  struct Coded {
    __m512i run;
    __m512i kind;
    __m512i row_bits;
    __m512 step;
    __m512i bit;  // its lower 32 bits
    __m512i byte_low;
    __m512i byte_high;
  };

  // They go to the ring; returns whether any is mixed. kPlain: the table has plain rows; kWord: its transformed ones
  // are read as words.
  template <bool kPlain, bool kWord>
  __attribute__((always_inline)) bool put_coded_16(const float* weights, int slot, __mmask16 live, const Coded& rows,
                                                   Ring& ring) const {
    const __m512i rank = _mm512_load_si512(ring.rank + slot);
    const __mmask16 valid = _mm512_cmpge_epi32_mask(rank, _mm512_setzero_si512());
    const __mmask16 transformed = _mm512_mask_test_epi32_mask(valid, rows.kind, _mm512_set1_epi32(kIsTransformed));
    const __mmask16 plain = kPlain ? _mm512_mask_test_epi32_mask(valid, rows.kind, _mm512_set1_epi32(15)) : 0;
    const __mmask16 stored = transformed | plain;
    // Bytes counted from the start of the row's line: of the row's first and last, and the first one that is read.
    const __m512i first_bit = _mm512_and_si512(rows.bit, _mm512_set1_epi32(8 * kLineBytes - 1));
    const __m512i end_bit = _mm512_add_epi32(first_bit, rows.row_bits);
    const __m512i start = _mm512_srli_epi32(first_bit, 3);
    const __m512i last = _mm512_max_epi32(_mm512_srai_epi32(_mm512_sub_epi32(end_bit, _mm512_set1_epi32(1)), 3), start);
    // So many bytes are read from the row's first on, or the last ones of the line in which it ends: of no other line.
    const __m512i end_line = _mm512_and_si512(last, _mm512_set1_epi32(-kLineBytes));
    const auto of_line = [&](int bytes) __attribute__((always_inline)) {
      return _mm512_min_epi32(start, _mm512_or_si512(end_line, _mm512_set1_epi32(kLineBytes - bytes)));
    };
    __m512i read = of_line(kWord ? 8 : 32);
    if (kPlain) {
      read = _mm512_maskz_mov_epi32(transformed, read);
      if (table_.blocks <= 2) {
        read = _mm512_mask_mov_epi32(read, plain, of_line(16));
      }
    }
    const __m512i position = _mm512_sub_epi32(start, read);
    const auto put_8 = [&](int at, __mmask8 stored_8, __m512i byte, __m256i position_8, __m256i length_8)
                           __attribute__((always_inline)) {
      _mm512_store_si512(ring.start + at, _mm512_maskz_sub_epi64(stored_8, byte, _mm512_cvtepu32_epi64(position_8)));
      if (kPlain || !kWord) {
        _mm512_store_si512(ring.last + at, _mm512_maskz_add_epi64(stored_8, byte, _mm512_cvtepu32_epi64(length_8)));
      }
    };
    const __m512i length = _mm512_sub_epi32(last, start);
    put_8(slot, static_cast<__mmask8>(stored), rows.byte_low, _mm512_castsi512_si256(position),
          _mm512_castsi512_si256(length));
    put_8(slot + 8, static_cast<__mmask8>(stored >> 8), rows.byte_high, _mm512_extracti64x4_epi64(position, 1),
          _mm512_extracti64x4_epi64(length, 1));
    const __m512i in_each_byte = _mm512_set1_epi32(0x01010101);
    const __m512i shift = kWord ? _mm512_sub_epi32(first_bit, _mm512_slli_epi32(read, 3))
                                : _mm512_and_si512(first_bit, _mm512_set1_epi32(7));
    _mm512_store_si512(ring.shift + slot, _mm512_maskz_mullo_epi32(transformed, shift, in_each_byte));
    if (kPlain || !kWord) {
      const __m512i in_bytes = _mm512_maskz_mullo_epi32(stored, position, in_each_byte);
      if (kPlain) {
        const __m512i width = _mm512_maskz_and_epi32(plain, rows.kind, _mm512_set1_epi32(15));
        // Short rows: which of permute_16 they need.
        const __m512i of_short = _mm512_mask_add_epi32(in_bytes, static_cast<__mmask16>(~transformed),
                                                       _mm512_slli_epi32(width, 4),
                                                       _mm512_maskz_mov_epi32(plain, position));
        _mm512_store_si512(ring.position + slot, table_.blocks <= 2 ? of_short : in_bytes);
        _mm512_store_si512(ring.bits + slot, width);
      } else {
        _mm512_store_si512(ring.position + slot, in_bytes);
      }
    }
    const __m512i run = _mm512_mask_mov_epi32(_mm512_set1_epi32(runs_->none()), transformed, rows.run);
    _mm512_store_si512(ring.run + slot, _mm512_mullo_epi32(run, _mm512_set1_epi32(Decoder::kRunBytes)));
    __m512 weight = weights == nullptr ? _mm512_set1_ps(1.0f) : _mm512_maskz_loadu_ps(live, weights);
    weight = _mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(rank, _mm512_set1_epi32(kPruned)), weight);
    if (kPlain) {
      _mm512_store_ps(ring.scale + slot, _mm512_maskz_mul_ps(plain, weight, rows.step));
    }
    if (!kWord) {
      _mm512_store_ps(ring.weight + slot, _mm512_maskz_mov_ps(transformed, weight));
    }
    _mm512_store_ps(ring.kept + slot, _mm512_maskz_mov_ps(stored, weight));
    _mm512_store_ps(ring.zero + slot, _mm512_maskz_mov_ps(static_cast<__mmask16>(~stored), weight));
    return weights != nullptr || (stored & live) != live;
  }

  // 16 rows, of which `stored` lie in the weights, to the ring; returns whether any is mixed.
  template <bool kWeighted>
  __attribute__((always_inline)) bool put_16(const float* weights, int slot, __mmask16 live, __m512i rank,
                                             __mmask16 stored, __m512i low, __m512i high, __m512i bits, __m512 step,
                                             Ring& ring) const {
    const __m512i width = _mm512_maskz_mov_epi32(stored, bits);
    const __m512i last_byte = _mm512_mask_sub_epi32(
        width, stored, _mm512_mullo_epi32(width, _mm512_set1_epi32(table_.blocks)), _mm512_set1_epi32(1));
    const __m256i position_low =
        put_8(slot, static_cast<__mmask8>(stored), low, _mm512_castsi512_si256(last_byte), ring);
    const __m256i position_high = put_8(slot + 8, static_cast<__mmask8>(stored >> 8), high,
                                        _mm512_extracti64x4_epi64(last_byte, 1), ring);
    const __m512i position = _mm512_inserti64x4(_mm512_castsi256_si512(position_low), position_high, 1);
    // Short rows: which of permute_16 they need. Others: the place in the line, in each of the four bytes.
    _mm512_store_si512(ring.position + slot,
                       table_.blocks <= 2 ? _mm512_add_epi32(_mm512_slli_epi32(width, 4), position)
                                          : _mm512_mullo_epi32(position, _mm512_set1_epi32(0x01010101)));
    _mm512_store_si512(ring.bits + slot, width);
    const bool mixed = kWeighted || (stored & live) != live;
    __m512 weight = _mm512_set1_ps(1.0f);
    if (kWeighted && weights != nullptr) {
      weight = _mm512_maskz_loadu_ps(live, weights);
    }
    weight = _mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(rank, _mm512_set1_epi32(kPruned)), weight);
    _mm512_store_ps(ring.scale + slot, _mm512_maskz_mul_ps(stored, weight, step));
    _mm512_store_ps(ring.kept + slot, _mm512_maskz_mov_ps(stored, weight));
    _mm512_store_ps(ring.zero + slot, _mm512_maskz_mov_ps(static_cast<__mmask16>(~stored), weight));
    return mixed;
  }

  // Where 8 rows are read from, and where in that they start.
  __attribute__((always_inline)) __m256i put_8(int slot, __mmask8 stored, __m512i offset, __m256i last_byte,
                                               Ring& ring) const {
    const __m512i start = _mm512_maskz_mov_epi64(stored, offset);
    const __m512i last = _mm512_add_epi64(start, _mm512_cvtepu32_epi64(last_byte));
    const __m512i line = _mm512_set1_epi64(-kLineBytes);
    __m512i read = _mm512_and_si512(start, line);
    if (table_.blocks <= 2) {
      // The 16 bytes from the row's first on, or the last 16 of the line in which it ends: no other line is touched.
      const __m512i last_16 = _mm512_or_si512(_mm512_and_si512(last, line), _mm512_set1_epi64(kLineBytes - 16));
      read = _mm512_min_epi64(start, last_16);
    }
    _mm512_store_si512(ring.start + slot, read);
    _mm512_store_si512(ring.last + slot, last);
    return _mm512_cvtepi64_epi32(_mm512_sub_epi64(start, read));
  }

  const PackedTable& table_;
  const CheckedRuns* runs_;
  bool word_;           // transformed rows are read as words
  bool coded_ = false;  // and not just few runs of plain rows
  bool few_runs_ = false;
  bool has_plain_ = true;
  bool far_ = false;    // whether any bit needs more than 32 bits
  bool damaged_ = false;
  Rows rows_ = Rows::Any;
  alignas(64) float alpha_[16] = {};  // of each width, for what the accumulator sums
  alignas(64) int32_t starts_[kFewRuns] = {};
  alignas(64) int32_t search_[kRunsInRegisters];  // run k's start at 16 * (k % 4) + k / 4, if there are more than 16
  // Of each run:
  alignas(64) int64_t bits_[kRunsInRegisters] = {};
  alignas(64) int32_t low_bits_[kRunsInRegisters] = {};
  alignas(64) int32_t row_bits_[kRunsInRegisters] = {};
  alignas(64) int32_t kinds_[kRunsInRegisters] = {};  // the bit-width of plain rows, or kIsTransformed
  alignas(64) float steps_[kRunsInRegisters] = {};
};

inline void add_weights(const Ring& ring, int first, int count, float& kept, float& zero) {
  __m512 kept_sum = _mm512_setzero_ps();
  __m512 zero_sum = _mm512_setzero_ps();
  for (int i = 0; i < count; i += 16) {
    const int slot = (first + i) & (kRing - 1);
    const __mmask16 live = live_of(count - i);
    const __mmask16 unwrapped = live & live_of(kRing - slot);
    kept_sum = _mm512_add_ps(kept_sum, _mm512_maskz_loadu_ps(unwrapped, ring.kept + slot));
    zero_sum = _mm512_add_ps(zero_sum, _mm512_maskz_loadu_ps(unwrapped, ring.zero + slot));
    if (unwrapped != live) {
      // In the lanes where they would be without the wrap: a sum does not depend on where its bag is in the ring.
      const __mmask16 wrapped = live & static_cast<__mmask16>(~unwrapped);
      kept_sum = _mm512_add_ps(kept_sum, _mm512_maskz_expandloadu_ps(wrapped, ring.kept));
      zero_sum = _mm512_add_ps(zero_sum, _mm512_maskz_expandloadu_ps(wrapped, ring.zero));
    }
  }
  kept += _mm512_reduce_add_ps(kept_sum);
  zero += _mm512_reduce_add_ps(zero_sum);
}
