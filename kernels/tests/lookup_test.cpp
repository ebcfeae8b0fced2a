// Tests of the CPU lookup for every instruction set of the machine: against pooling in double precision of the codes
// that were stored, split into ranges, and on damaged tables. Built with AddressSanitizer by `make test-cpp`.
#include "lookup_checks.h"

namespace torchrec_mpe {
namespace {

constexpr int32_t kDims[] = {1, 5, 8, 9, 16, 24, 31, 64, 96, 100, 128, 256, 300};
constexpr Directory kDirectories[] = {Directory::Ranked, Directory::Remap, Directory::Nibble, Directory::Bitmap,
                                      Directory::BitmapNibble};

enum class Widths { One, FewRuns, Random, AllZero };
constexpr Widths kWidths[] = {Widths::One, Widths::FewRuns, Widths::Random, Widths::AllZero};

std::vector<int> row_widths(Widths widths, int64_t num_rows, int one, bool mostly_zero, Random& random) {
  std::vector<int> bits(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    switch (widths) {
      case Widths::One: bits[i] = one; break;
      case Widths::FewRuns: bits[i] = static_cast<int>(kMaxBits - i * (kMaxBits + 1) / num_rows); break;
      case Widths::Random: bits[i] = static_cast<int>(random.below(kMaxBits + 1)); break;
      case Widths::AllZero: bits[i] = 0; break;
    }
    bits[i] = mostly_zero && random.below(3) > 0 ? 0 : bits[i];
  }
  return bits;
}

void test_lookups() {
  Random random(1);
  int turn = 0;
  for (const int32_t dim : kDims) {
    for (const Directory kind : kDirectories) {
      for (const Widths widths : kWidths) {
        const int64_t row_counts[] = {700, 449, 121, 1};
        const int64_t num_rows = row_counts[turn % 4];
        const int one = turn % kMaxBits + 1;
        const bool has_bitmap = kind == Directory::Bitmap || kind == Directory::BitmapNibble;
        set_case("dim %d, directory %d, widths %d, %d rows", dim, static_cast<int>(kind), static_cast<int>(widths),
                 static_cast<int>(num_rows));
        const Rows rows(dim, row_widths(widths, num_rows, one, has_bitmap, random), random);
        look_up(rows, store(rows, kind, random), turn, random);
        ++turn;
      }
    }
  }
}

// Every width alone, in rows of one to three blocks and of several lines: the last row ends with the weights.
void test_last_rows() {
  Random random(2);
  for (const int32_t dim : {8, 16, 24, 64, 128, 300}) {
    for (int bits = 0; bits <= kMaxBits; ++bits) {
      for (const Directory kind : {Directory::Ranked, Directory::Nibble}) {
        set_case("last row: dim %d, %d bits, directory %d", dim, bits, static_cast<int>(kind));
        const Rows rows(dim, std::vector<int>(37, bits), random);
        look_up(rows, store(rows, kind, random), bits, random);
      }
    }
  }
}

void test_bad_ids() {
  Random random(3);
  for (const int32_t dim : {16, 64, 100}) {
    for (const Directory kind : kDirectories) {
      const Rows rows(dim, row_widths(Widths::Random, 500, 0, false, random), random);
      const StoredTable table = store(rows, kind, random);
      const FencedTable fenced(table);
      for (const bool wide : {false, true}) {
        LookupInputs inputs = make_inputs(fenced.view(), false, false, random);
        inputs.indices_64 = wide;
        int64_t bad = 0;
        int64_t first = -1;
        for (size_t i = 40; i < inputs.ids.size(); i += 1 + random.below(60)) {
          const int64_t ids[] = {500, -2, INT32_MAX, INT32_MIN, wide ? INT64_MAX : 1000, wide ? int64_t{1} << 32 : -3};
          inputs.ids[i] = ids[random.below(6)];
          first = first < 0 ? static_cast<int64_t>(i) : first;
          ++bad;
        }
        FencedLookup lookup(inputs);
        for (const InstructionSet& set : instruction_sets()) {
          set_case("bad int%d ids: dim %d, directory %d, %s", wide ? 64 : 32, dim, static_cast<int>(kind), set.name);
          const LookupResult result = lookup.run(set.lookup_bags, all_bags(inputs));
          const Faults& faults = result.faults[0];
          check(faults.bad_ids == bad && faults.first_bad_id == first && faults.bad_id_feature == 0,
                "%d bad ids from %d on are reported as %d from %d on", static_cast<int>(bad), static_cast<int>(first),
                static_cast<int>(faults.bad_ids), static_cast<int>(faults.first_bad_id));
          check(faults.bad_offset == -1 && faults.damaged_feature == -1, "bad ids are no other fault");
          check_bags(inputs, rows, table, result);
        }
      }
    }
  }
}

void test_bad_offsets() {
  Random random(4);
  const Rows rows(24, row_widths(Widths::FewRuns, 300, 0, false, random), random);
  const StoredTable table = store(rows, Directory::Ranked, random);
  const FencedTable fenced(table);
  const int64_t values[] = {0, -1, INT32_MIN, INT32_MAX, INT64_MIN, INT64_MAX};
  for (const int64_t value : values) {
    for (const int64_t bag : {5, 7, 14}) {
      LookupInputs inputs = make_inputs(fenced.view(), true, false, random);
      inputs.offsets_64 = value < INT32_MIN || value > INT32_MAX || bag % 2 == 0;
      inputs.offsets[bag] = value;
      FencedLookup lookup(inputs);
      for (const InstructionSet& set : instruction_sets()) {
        set_case("offset %lld at bag %d, %s", static_cast<long long>(value), static_cast<int>(bag), set.name);
        // The binding may cut anywhere, at the damage too.
        for (const int64_t cut : {int64_t{0}, int64_t{2}, bag - 1, bag, bag + 1}) {
          const LookupResult result = lookup.run(set.lookup_bags, {0, cut, all_bags(inputs)[1]});
          check(result.faults[0].bad_offset >= 0 || result.faults[1].bad_offset >= 0, "is no fault, cut at bag %d",
                static_cast<int>(cut));
        }
      }
    }
  }
}

void test_damaged_tables() {
  Random random(6);
  for (const int32_t dim : {8, 16, 64, 100, 300}) {
    for (const Directory kind : kDirectories) {
      const bool has_bitmap = kind == Directory::Bitmap || kind == Directory::BitmapNibble;
      const Rows rows(dim, row_widths(Widths::One, 300, 4, has_bitmap, random), random);
      const StoredTable sound = store(rows, kind, random);

      StoredTable table = sound;
      set_case("weights cut short");
      table.weights.resize(kEndPadding);
      check_damaged(table);
      set_case("weights one byte short");
      table.weights.resize(sound.weights.size() - 1);
      check_damaged(table);

      for (const int64_t offset : {int64_t{1}, int64_t{-1}, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
        set_case("run at bit %lld", static_cast<long long>(offset));
        table = sound;
        if (table.runs.empty()) {
          continue;
        }
        table.runs[0].bit = offset;
        check_damaged(table);
      }
      for (const uint32_t bits : {9u, 15u, 16u, 0x80000004u, 0xffffffffu}) {
        set_case("%u bits", bits);
        table = sound;
        if (table.runs.empty()) {
          continue;
        }
        table.runs[0].coding = bits;
        check_damaged(table);
      }
      if (has_bitmap) {
        for (const uint64_t rank : {uint64_t{300}, uint64_t{0x7fffff00}, ~uint64_t{0} / 2}) {
          set_case("first rank %llu", static_cast<unsigned long long>(rank));
          table = sound;
          put(table.directory, 0, rank);
          // Ranks beyond the nibble lines read the last one, whose rows are sound.
          check_damaged(table, kind == Directory::Bitmap);
        }
      }
      if (kind == Directory::Nibble || kind == Directory::BitmapNibble) {
        set_case("first unit beyond the weights");
        table = sound;
        put(table.directory, table.directory.size() - kLineBytes, ~uint32_t{0});
        check_damaged(table);
        set_case("widths of 15 bits");
        table = sound;
        std::memset(table.directory.data() + table.directory.size() - kLineBytes + 4, 0xff, kLineBytes - 4);
        check_damaged(table);
      }
    }
  }
}

// A remap's entry beyond the table's ranks reads nothing and is reported.
void test_remap_beyond_table() {
  Random random(10);
  for (const int32_t rank : {300, INT32_MAX, -1, INT32_MIN}) {
    const Rows rows(24, std::vector<int>(300, 4), random);
    StoredTable table = store(rows, Directory::Remap, random);
    for (int64_t row = 1; row < 300; row += 2) {
      put(table.directory, 4 * row, rank);
    }
    set_case("remap to rank %d", rank);
    check_damaged(table);
  }
}

// Starts that do not ascend: ranks 10 to 99 are at or after two of them, and so in a run that says it has no rows and
// that ends with the weights.
void test_unordered_run_starts() {
  Random random(7);
  for (const int32_t dim : {8, 64, 300}) {
    for (const Directory kind : {Directory::Ranked, Directory::Remap}) {
      const Rows rows(dim, std::vector<int>(300, 4), random);
      StoredTable table = store(rows, kind, random);
      const uint32_t row_bits = static_cast<uint32_t>(32 * rows.blocks());
      const int64_t end = 8 * (static_cast<int64_t>(table.weights.size()) - kEndPadding);
      table.runs = {{0, row_bits, 4}, {0, 0, 0}, {end - 10 * row_bits, row_bits, 4}, {0, row_bits, 4}};
      table.run_starts = {0, 100, 10, 10};
      set_case("run starts out of order");
      check_damaged(table);
    }
  }
}

// A table without nibble lines has runs if it says so, and ranks from a bitmap that may lie.
void test_bitmap_without_nibbles() {
  Random random(9);
  for (const int32_t dim : {8, 64, 300}) {
    const Rows rows(dim, std::vector<int>(400, 4), random);
    StoredTable table = store(rows, Directory::Bitmap, random);
    table.kind = Directory::BitmapNibble;
    put(table.directory, 0, uint64_t{1000});
    set_case("runs after a bitmap with a first rank of 1000");
    check_damaged(table);
  }
}

// One row whose pooled embedding is beta: every way to round it must be the nearest number, ties to even.
void test_output_rounding() {
  Random random(8);
  const Rows rows(256, std::vector<int>(1, 1), random);
  StoredTable table = store(rows, Directory::Ranked, random);
  table.alpha.assign(kMaxBits + 1, 0.0f);
  const float special[] = {0.0f, 1.0f, 65504.0f, 65519.0f, 65520.0f, 1e6f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1p-14f,
                           0x1.ffcp-15f, 0x1.004p0f, 0x1.00cp0f, 0x1.01p0f, 0x1.03p0f, 3e38f, 0x1p-140f, INFINITY, NAN};
  size_t d = 0;
  for (const float value : special) {
    table.beta[d++] = value;
    table.beta[d++] = -value;
  }
  for (; d < table.beta.size(); ++d) {
    table.beta[d] = std::ldexp(random.unit(), static_cast<int>(random.below(50)) - 30);
  }
  const FencedTable fenced(table);
  for (const OutputType type : {OutputType::Half, OutputType::BFloat16}) {
    LookupInputs inputs;
    inputs.features = {{&fenced.view(), 0, false}};
    inputs.batch = 1;
    inputs.output_stride = 256;
    inputs.ids = {0};
    inputs.offsets = {0, 1};
    inputs.output_type = type;
    FencedLookup lookup(inputs);
    for (const InstructionSet& set : instruction_sets()) {
      set_case("output %d, %s", static_cast<int>(type), set.name);
      const LookupResult result = lookup.run(set.lookup_bags, {0, 1});
      for (int32_t i = 0; i < 256; ++i) {
        const double value = table.beta[i];
        const double got = result.at(i);
        if (std::isnan(value)) {
          check(std::isnan(got), "NaN is stored as %g", got);
          continue;
        }
        // What lies half a unit beyond the largest number is infinite.
        const double largest = LookupResult::decode(type, type == OutputType::Half ? 0x7bff : 0x7f7f);
        const double limit = type == OutputType::Half ? 65520.0 : 0x1.ffp127;
        double nearest = INFINITY;
        bool even = false;
        for (uint32_t word = 0; word < 0x8000; ++word) {
          const double candidate = LookupResult::decode(type, static_cast<uint16_t>(word));
          const double distance = std::fabs(candidate - std::fabs(value));
          const double best = std::fabs(nearest - std::fabs(value));
          if (candidate <= largest && (distance < best || (distance == best && !even && word % 2 == 0))) {
            nearest = candidate;
            even = word % 2 == 0;
          }
        }
        const double expected = std::fabs(value) >= limit ? INFINITY : nearest;
        // The sum of a row's zeros is +0, whatever beta's is.
        check(std::fabs(got) == expected && (value == 0.0 || std::signbit(got) == std::signbit(value)),
              "%.9g is stored as %.9g, not %.9g", value, got, std::copysign(expected, value));
      }
    }
  }
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  using namespace torchrec_mpe;
  test_lookups();
  test_last_rows();
  test_bad_ids();
  test_bad_offsets();
  test_damaged_tables();
  test_unordered_run_starts();
  test_bitmap_without_nibbles();
  test_remap_beyond_table();
  test_output_rounding();
  report("lookup_test");
  return 0;
}
