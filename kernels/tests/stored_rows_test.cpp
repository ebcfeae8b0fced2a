// Tests of writing and reading stored rows, for every instruction set of the machine: the bits of the scalar one,
// values within a step of the row, no byte beyond any buffer. Built with AddressSanitizer, and with ThreadSanitizer for
// the writing of several threads, by `make test-cpp`.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "fenced_buffer.h"
#include "instruction_sets.h"
#include "random_source.h"

namespace torchrec_mpe {
namespace {

constexpr uint8_t kUntouched = 0xcd;
constexpr int64_t kSlots = 70, kMoves = 61;

struct Layout {
  int64_t dim;
  int bits;  // 4, 8, or 0 for both
  std::vector<StateType> states;
};

// A table whose buffers all end where a page does.
struct Table {
  Table(const Layout& layout, Random& random)
      : num_rows(layout.bits == 0 ? 130 : 90),
        is_wide((num_rows + 63) / 64),
        before((num_rows + 63) / 64),
        values(kSlots * layout.dim),
        slots(kMoves),
        rows(kMoves) {
    int64_t state_bytes = 0;
    for (size_t s = 0; s < layout.states.size(); ++s) {
      const int64_t elements = s == 0 ? 1 : layout.dim + 1;
      state_values.emplace_back(new FencedBuffer<float>(kSlots * elements));
      states.push_back({state_values.back()->data(), elements, layout.states[s]});
      const StateType type = layout.states[s];
      state_bytes += elements * (type == StateType::Float ? 4 : type == StateType::BFloat16 ? 2 : 1);
      for (int64_t i = 0; i < kSlots * elements; ++i) {
        state_values.back()->data()[i] = std::ldexp(random.unit() + 1, static_cast<int>(random.below(60)) - 40);
      }
    }
    int64_t wide = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      const bool is = layout.bits == 8 || (layout.bits == 0 && random.below(3) == 0);
      before.data()[r / 64] = r % 64 == 0 ? static_cast<int32_t>(wide) : before.data()[r / 64];
      is_wide.data()[r / 64] = static_cast<int64_t>(static_cast<uint64_t>(r % 64 == 0 ? 0 : is_wide.data()[r / 64]) |
                                                    static_cast<uint64_t>(is) << r % 64);
      wide += is;
    }
    const int64_t bytes4 = layout.dim / 2 + 2 + state_bytes, bytes8 = layout.dim + 2 + state_bytes;
    rows4.reset(new FencedBuffer<uint8_t>((num_rows - wide) * bytes4));
    rows8.reset(new FencedBuffer<uint8_t>(wide * bytes8));
    std::memset(rows4->data(), kUntouched, rows4->size());
    std::memset(rows8->data(), kUntouched, rows8->size());
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      const float size = std::ldexp(1.0f, static_cast<int>(random.below(170)) - 120);
      for (int64_t d = 0; d < layout.dim; ++d) {
        values.data()[slot * layout.dim + d] = slot % 10 == 0 ? 0.0f : slot % 10 == 1 ? size : random.unit() * size;
      }
    }
    values.data()[5] = NAN;
    for (int64_t k = 0; k < 14; ++k) {  // half-way between codes of 4 or of 8 bits, where a product's rounding shows
      const int64_t top = k < 7 ? 14 : 250;
      float* const row = values.data() + (40 + k) * layout.dim;
      for (int64_t d = 0; d < layout.dim; ++d) {
        const float code = d == 0 ? 0.0f : static_cast<float>(d == 1 ? top : random.below(top + 1)) + 0.5f;
        row[d] = ((k < 7 ? -20.0f : -400.0f) + code) * static_cast<float>(9 + k % 7) / 8.0f;
      }
    }
    for (int64_t i = 0; i < kMoves; ++i) {
      slots.data()[i] = static_cast<int32_t>(kSlots - 1 - i);
      rows.data()[i] = static_cast<int32_t>(i % 2 == 0 ? num_rows - 1 - i / 2 : i / 2);
    }
    view = {rows4->data(), rows8->data(), num_rows - wide, wide, bytes4, bytes8,
            layout.bits == 0 ? is_wide.data() : nullptr, before.data(), values.data(), layout.dim, states.data(),
            static_cast<int64_t>(states.size()), slots.data(), rows.data()};
  }

  int64_t num_rows;
  FencedBuffer<int64_t> is_wide;
  FencedBuffer<int32_t> before;
  FencedBuffer<float> values;
  FencedBuffer<int32_t> slots, rows;
  std::vector<std::unique_ptr<FencedBuffer<float>>> state_values;
  std::vector<CachedState> states;
  std::unique_ptr<FencedBuffer<uint8_t>> rows4, rows8;
  StoredRows view;
};

int fail(const char* what, const InstructionSet& set, const Layout& layout) {
  std::fprintf(stderr, "FAILED stored rows, %s: dim %d, %d bits, %d states, %s\n", what, static_cast<int>(layout.dim),
               layout.bits, static_cast<int>(layout.states.size()), set.name);
  return 1;
}

// Whether what is read of every row that can be stored is within a step of what was written.
bool close(const Table& table, const std::vector<float>& written, int64_t dim) {
  for (int64_t i = 0; i < kMoves; ++i) {
    const float* before = written.data() + table.slots.data()[i] * dim;
    const float* after = table.values.data() + table.slots.data()[i] * dim;
    const StoredPlace place = place_of(table.view, table.rows.data()[i]);
    const int bits = place.wide ? 8 : 4;
    const uint8_t* row = place.wide ? table.rows8->data() + place.index * table.view.row_bytes8
                                    : table.rows4->data() + place.index * table.view.row_bytes4;
    const int byte = row[dim * bits / 8];
    if (byte >= 254) {
      continue;  // too large, or NaN
    }
    const float step = byte == 0 ? 0.0f : std::ldexp(1.0f + (byte & 7) / 8.0f, (byte >> 3) - 26);
    for (int64_t d = 0; d < dim; ++d) {
      if (!(std::fabs(after[d] - before[d]) <= step * 1.0001f + std::fabs(before[d]) * 1e-6f)) {
        return false;
      }
    }
  }
  return true;
}

int test(const Layout& layout, int& tables) {
  for (const bool stochastic : {true, false}) {
    const Rounding rounding{stochastic, 77, 0x123456789abcdefull, (int64_t{1} << 32) - 40, 8};
    std::vector<uint8_t> bits4, bits8, read;
    for (const InstructionSet& set : instruction_sets()) {
      Random random(static_cast<uint64_t>(layout.dim) + 1);
      Table table(layout, random);
      const std::vector<float> written(table.values.data(), table.values.data() + table.values.size());
      // Two threads, as a large call would.
      std::thread other([&] { set.write_rows(table.view, rounding, 21, kMoves); });
      set.write_rows(table.view, rounding, 0, 21);
      other.join();
      set.write_rows(table.view, rounding, 5, 5);
      std::memset(table.values.data(), 0, table.values.size() * sizeof(float));
      std::thread reader([&] { set.read_rows(table.view, 0, 30); });
      set.read_rows(table.view, 30, kMoves);
      reader.join();
      if (!close(table, written, layout.dim)) {
        return fail("a value is more than a step off", set, layout);
      }
      const auto bytes = [](const void* data, size_t size) {
        const uint8_t* first = static_cast<const uint8_t*>(data);
        return std::vector<uint8_t>(first, first + size);
      };
      std::vector<uint8_t> now4 = bytes(table.rows4->data(), table.rows4->size());
      std::vector<uint8_t> now8 = bytes(table.rows8->data(), table.rows8->size());
      std::vector<uint8_t> now_read = bytes(table.values.data(), table.values.size() * sizeof(float));
      for (const auto& state : table.state_values) {
        const std::vector<uint8_t> more = bytes(state->data(), state->size() * sizeof(float));
        now_read.insert(now_read.end(), more.begin(), more.end());
      }
      if (read.empty()) {
        bits4 = now4, bits8 = now8, read = now_read;
      } else if (now4 != bits4 || now8 != bits8 || now_read != read) {
        return fail("bits are not the scalar ones", set, layout);
      }
      std::vector<bool> moved(table.num_rows);
      for (int64_t i = 0; i < kMoves; ++i) {
        moved[table.rows.data()[i]] = true;
      }
      for (int64_t r = 0; r < table.num_rows; ++r) {
        const StoredPlace place = place_of(table.view, r);
        const int64_t size = place.wide ? table.view.row_bytes8 : table.view.row_bytes4;
        const uint8_t* row = (place.wide ? table.rows8 : table.rows4)->data() + place.index * size;
        for (int64_t k = 0; !moved[r] && k < size; ++k) {
          if (row[k] != kUntouched) {
            return fail("a row that does not move was written", set, layout);
          }
        }
      }
      ++tables;
    }
  }
  return 0;
}

int run() {
  int tables = 0;
  const std::vector<std::vector<StateType>> states{
      {}, {StateType::Float}, {StateType::BFloat16, StateType::Ue6m2}, {StateType::Ue6m2, StateType::Float}};
  for (const int64_t dim : {2, 4, 8, 16, 20, 34, 64, 100, 128}) {
    for (const int bits : {0, 4, 8}) {
      for (const std::vector<StateType>& of : states) {
        if (test({dim, bits, of}, tables) != 0) {
          return 1;
        }
      }
    }
  }
  std::printf("stored_rows_test: %d tables written and read\n", tables);
  return 0;
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  return torchrec_mpe::run();
}
