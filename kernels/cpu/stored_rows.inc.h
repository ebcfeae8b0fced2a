// The kernels of stored_rows.h. Included inside an instruction set's namespace and target region, after
// <cstring>, <vector>, stored_rows_lanes.h and the definition of
//   void product(const Words& a, uint32_t b, Words& result): lane by lane the low 32 bits of a times b.

// A product and a sum stay two roundings, as in the reference.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

constexpr int64_t kGroup = 8;   // rows that draw their random numbers together, one a lane
constexpr int64_t kAhead = 16;  // rows ahead that memory is asked for
constexpr int64_t kLanes = 16;  // columns at a time
constexpr uint16_t kHalf = 1 << 15;

constexpr int32_t kScaleBase = 101 << 23;
constexpr int32_t kScaleZero = 0, kScaleLargest = 254, kScaleNaN = 255;
constexpr int32_t kStateBase = 83 << 23;
constexpr uint32_t kStreamCodes = 0, kStreamStates = 1;

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Philox-4x32-10 of 8 counters: 8 halves of words each, lane k's at to + k * stride. Upper halves of lanes are rubbish.
inline void draw(const Words& row_low, uint32_t batch, uint32_t column, const Words& row_high, uint64_t seed,
                 uint16_t* to, int64_t stride) {
  Words c0 = row_low, c1 = Words{} + batch, c2 = Words{} + column, c3 = row_high;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words p0, p1;
    product(c0, 0xD2511F53u, p0);
    product(c2, 0xCD9E8D57u, p1);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Words first = (c0 & 0xffffffffu) | c1 << 32, second = (c2 & 0xffffffffu) | c3 << 32;
  for (int64_t k = 0; k < kGroup; ++k) {
    const uint64_t pair[2] = {first[k], second[k]};
    __builtin_memcpy(to + k * stride, pair, 16);
  }
}

// The noise of columns [begin, end) of kGroup rows, from that of their first eight on.
inline void draw_columns(const Words& number, uint32_t stream, const Rounding& rounding, int64_t begin, int64_t end,
                         uint16_t* noise, int64_t stride) {
  const Words high = (number >> 32 << 8) + stream;
  for (int64_t c = begin / 8 * 8; c < end; c += 8) {
    draw(number, rounding.batch, static_cast<uint32_t>(rounding.first_column + c), high, rounding.seed, noise + c,
         stride);
  }
}

inline void load(const float* from, Floats& to) {
  __builtin_memcpy(&to, from, sizeof(to));
}

inline Codes16 bytes_of(const Integers& codes) {
  return __builtin_convertvector(codes, Codes16);
}

// Two codes a byte, the first in the low half.
inline Codes8 halves_of(const Integers& codes) {
  const Pairs pairs = reinterpret_cast<Pairs>(bytes_of(codes));
  return __builtin_convertvector((pairs | pairs >> 4) & 0xff, Codes8);
}

// `padded` values from x on repeat one of the row's `dim`. Writes codes, scale and offset.
template <int bits>
void quantize_row(const float* x, int64_t dim, int64_t padded, const uint16_t* noise, float shift, uint8_t* to) {
  constexpr float levels = (1 << bits) - 1;
  constexpr float grain = bits == 4 ? 0.25f : 4.0f;
  constexpr float per_grain = bits == 4 ? 4.0f : 0.25f;
  const int64_t code_bytes = dim * bits / 8;
  Floats low, high, value;
  load(x, low);
  high = low;
  Integers largest = reinterpret_cast<Integers>(low) & 0x7fffffff;
  for (int64_t d = kLanes; d < padded; d += kLanes) {
    load(x + d, value);
    low = value < low ? value : low;
    high = value > high ? value : high;
    const Integers magnitude = reinterpret_cast<Integers>(value) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  float least = low[0], most = high[0];
  int32_t exponent = largest[0];
  for (int64_t k = 1; k < kLanes; ++k) {
    least = low[k] < least ? low[k] : least;
    most = high[k] > most ? high[k] : most;
    exponent = largest[k] > exponent ? largest[k] : exponent;
  }
  const bool finite = exponent < 0x7f800000;
  if (!finite || (least == 0.0f && most == 0.0f)) {
    std::memset(to, 0, code_bytes + 2);
    to[code_bytes] = finite ? kScaleZero : kScaleNaN;
    return;
  }
  // The smallest scale that is not below what the row needs: mantissa bits below the kept ones round up.
  const float for_range = (most - least) / (levels - grain), for_offset = __builtin_fabsf(least) / (127 * grain);
  const int32_t needed = bits_of<int32_t>(for_range > for_offset ? for_range : for_offset);
  int32_t byte = (needed - kScaleBase + 0xfffff) >> 20;
  byte = byte < 1 ? 1 : byte > kScaleLargest ? kScaleLargest : byte;
  const float inverse = 1.0f / bits_of<float>(kScaleBase + (byte << 20));
  float offset = __builtin_floorf(least * inverse * per_grain);
  offset = offset < -128.0f ? -128.0f : offset > 127.0f ? 127.0f : offset;
  const float start = offset * grain;
  for (int64_t d = 0; d < padded; d += kLanes) {
    load(x + d, value);
    Halves half_words;
    __builtin_memcpy(&half_words, noise + d, sizeof(half_words));
    const Integers words = __builtin_convertvector(half_words, Integers);
    const Floats u = __builtin_convertvector(words, Floats) * 0x1p-16f + shift;
    const Floats product_of = value * inverse;
    Floats code = (product_of - start) + u;
    code = code < 0.0f ? Floats{} : code;
    code = code > levels ? Floats{} + levels : code;
    const Integers codes = __builtin_convertvector(code, Integers);  // floor: none is negative
    const int64_t columns = dim - d < kLanes ? dim - d : kLanes;
    if (bits == 8) {
      const Codes16 bytes = bytes_of(codes);
      columns == kLanes ? std::memcpy(to + d, &bytes, 16) : std::memcpy(to + d, &bytes, columns);
    } else {
      const Codes8 bytes = halves_of(codes);
      columns == kLanes ? std::memcpy(to + d / 2, &bytes, 8) : std::memcpy(to + d / 2, &bytes, columns / 2);
    }
  }
  to[code_bytes] = static_cast<uint8_t>(byte);
  to[code_bytes + 1] = static_cast<uint8_t>(static_cast<int32_t>(offset));
}

template <int bits>
void dequantize_row(const uint8_t* from, int64_t dim, float* values) {
  constexpr float grain = bits == 4 ? 0.25f : 4.0f;
  const int64_t code_bytes = dim * bits / 8;
  const int32_t byte = from[code_bytes];
  if (byte == kScaleZero || byte == kScaleNaN) {
    const float all = byte == kScaleZero ? 0.0f : __builtin_nanf("");
    for (int64_t d = 0; d < dim; ++d) {
      values[d] = all;
    }
    return;
  }
  const float scale = bits_of<float>(kScaleBase + (byte << 20));
  const float start = static_cast<float>(static_cast<int8_t>(from[code_bytes + 1])) * grain;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t columns = dim - d < kLanes ? dim - d : kLanes;
    Codes16 bytes = {};
    if (bits == 8) {
      columns == kLanes ? std::memcpy(&bytes, from + d, 16) : std::memcpy(&bytes, from + d, columns);
    } else {
      Codes8 both = {};
      columns == kLanes ? std::memcpy(&both, from + d / 2, 8) : std::memcpy(&both, from + d / 2, columns / 2);
      const Pairs pairs = __builtin_convertvector(both, Pairs);
      bytes = reinterpret_cast<Codes16>((pairs | pairs << 4) & 0x0f0f);
    }
    const Integers codes = __builtin_convertvector(bytes, Integers);
    const Floats row = scale * (__builtin_convertvector(codes, Floats) + start);
    columns == kLanes ? std::memcpy(values + d, &row, 64) : std::memcpy(values + d, &row, 4 * columns);
  }
}

inline uint16_t to_bfloat16(float value, uint32_t noise) {
  const uint32_t word = bits_of<uint32_t>(value);
  const bool finite = (word & 0x7f800000u) != 0x7f800000u;
  const bool nan = !finite && (word & 0x007fffffu) != 0;
  return static_cast<uint16_t>((finite ? word + noise : nan ? word | 0x10000u : word) >> 16);
}

inline uint8_t to_ue6m2(float value, uint32_t noise) {
  const float smallest = bits_of<float>(kStateBase + (1 << 21));
  if (!(value > 0.0f)) {
    return value != value ? 255 : 0;
  }
  if (value < smallest) {
    return (static_cast<float>(noise) + 0.5f) * 0x1p-16f * smallest < value;
  }
  // 21 bits are cut off, the noise is their upper 16.
  const uint32_t byte = (bits_of<uint32_t>(value) - kStateBase + (noise << 5) + 16) >> 21;
  return static_cast<uint8_t>(byte < 255 ? byte : 255);
}

inline uint8_t* write_state(const CachedState& state, int64_t slot, const uint16_t* noise, uint8_t* to) {
  const float* values = state.values + slot * state.elements;
  if (state.type == StateType::Float) {
    state.elements == 1 ? std::memcpy(to, values, 4) : std::memcpy(to, values, 4 * state.elements);
    return to + 4 * state.elements;
  }
  if (state.type == StateType::BFloat16) {
    for (int64_t k = 0; k < state.elements; ++k) {
      const uint16_t word = to_bfloat16(values[k], noise[k]);
      __builtin_memcpy(to + 2 * k, &word, 2);
    }
    return to + 2 * state.elements;
  }
  for (int64_t k = 0; k < state.elements; ++k) {
    to[k] = to_ue6m2(values[k], noise[k]);
  }
  return to + state.elements;
}

inline const uint8_t* read_state(const CachedState& state, int64_t slot, const uint8_t* from) {
  float* values = state.values + slot * state.elements;
  if (state.type == StateType::Float) {
    state.elements == 1 ? std::memcpy(values, from, 4) : std::memcpy(values, from, 4 * state.elements);
    return from + 4 * state.elements;
  }
  if (state.type == StateType::BFloat16) {
    for (int64_t k = 0; k < state.elements; ++k) {
      uint16_t word;
      __builtin_memcpy(&word, from + 2 * k, 2);
      values[k] = bits_of<float>(static_cast<uint32_t>(word) << 16);
    }
    return from + 2 * state.elements;
  }
  for (int64_t k = 0; k < state.elements; ++k) {
    values[k] = from[k] > 0 ? bits_of<float>(kStateBase + (static_cast<int32_t>(from[k]) << 21)) : 0.0f;
  }
  return from + state.elements;
}

inline uint8_t* stored_row(const StoredRows& table, const StoredPlace& place) {
  return place.wide ? table.rows8 + place.index * table.row_bytes8 : table.rows4 + place.index * table.row_bytes4;
}

// Asks for the memory of a move that is to come.
template <bool store_is_written>
inline void prefetch(const StoredRows& table, int64_t move) {
  const StoredPlace place = place_of(table, table.rows[move]);
  const uint8_t* row = stored_row(table, place);
  const int64_t bytes = place.wide ? table.row_bytes8 : table.row_bytes4;
  for (const uint8_t* line = row; line < row + bytes; line += 64) {
    __builtin_prefetch(line, store_is_written);
  }
  __builtin_prefetch(row + bytes - 1, store_is_written);
  const float* values = table.values + table.slots[move] * table.dim;
  for (int64_t d = 0; d < table.dim; d += 16) {
    __builtin_prefetch(values + d, !store_is_written);
  }
  for (int64_t s = 0; s < table.num_states; ++s) {
    __builtin_prefetch(table.states[s].values + table.slots[move] * table.states[s].elements, !store_is_written);
  }
}

void write_stored_rows(const StoredRows& table, const Rounding& rounding, int64_t first, int64_t last) {
  const int64_t padded = (table.dim + kLanes - 1) / kLanes * kLanes;
  // Elements of states whose rounding needs noise.
  int64_t elements = 0, begin = 0, end = 0;
  for (int64_t s = 0; s < table.num_states; ++s) {
    const int64_t next = elements + table.states[s].elements;
    if (table.states[s].type != StateType::Float) {
      begin = end == 0 ? elements : begin;
      end = next;
    }
    elements = next;
  }
  const int64_t stride = (elements + 7) / 8 * 8;
  std::vector<uint16_t> noise(kGroup * padded, kHalf), state_noise(kGroup * stride, kHalf);
  std::vector<float> whole(padded);
  const float shift = rounding.stochastic ? 0x1p-17f : 0.0f;  // the noise stands for the middle of its 2^-16
  for (int64_t group = first; group < last; group += kGroup) {
    const int64_t count = last - group < kGroup ? last - group : kGroup;
    if (rounding.stochastic) {
      Words number = {};
      for (int64_t k = 0; k < count; ++k) {
        number[k] = static_cast<uint64_t>(table.rows[group + k] + rounding.first_row);
      }
      draw_columns(number, kStreamCodes, rounding, 0, table.dim, noise.data(), padded);
      draw_columns(number, kStreamStates, rounding, begin, end, state_noise.data(), stride);
    }
    for (int64_t k = 0; k < count; ++k) {
      if (group + k + kAhead < last) {
        prefetch<true>(table, group + k + kAhead);
      }
      const int64_t slot = table.slots[group + k];
      const float* values = table.values + slot * table.dim;
      if (padded != table.dim) {
        std::memcpy(whole.data(), values, 4 * table.dim);
        std::fill(whole.begin() + table.dim, whole.end(), values[0]);
        values = whole.data();
      }
      const StoredPlace place = place_of(table, table.rows[group + k]);
      uint8_t* to = stored_row(table, place);
      (place.wide ? quantize_row<8> : quantize_row<4>)(values, table.dim, padded, noise.data() + k * padded, shift, to);
      to += table.dim * (place.wide ? 8 : 4) / 8 + 2;
      const uint16_t* of_state = state_noise.data() + k * stride;
      for (int64_t s = 0; s < table.num_states; ++s) {
        to = write_state(table.states[s], slot, of_state, to);
        of_state += table.states[s].elements;
      }
    }
  }
}

void read_stored_rows(const StoredRows& table, int64_t first, int64_t last) {
  for (int64_t move = first; move < last; ++move) {
    if (move + kAhead < last) {
      prefetch<false>(table, move + kAhead);
    }
    const int64_t slot = table.slots[move];
    const StoredPlace place = place_of(table, table.rows[move]);
    const uint8_t* from = stored_row(table, place);
    (place.wide ? dequantize_row<8> : dequantize_row<4>)(from, table.dim, table.values + slot * table.dim);
    from += table.dim * (place.wide ? 8 : 4) / 8 + 2;
    for (int64_t s = 0; s < table.num_states; ++s) {
      from = read_state(table.states[s], slot, from);
    }
  }
}
