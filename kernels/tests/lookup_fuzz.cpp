// A fuzz target: whatever a table's bytes, its run records, ids and offsets are, the lookup stays within the memory
// that the op's binding admits, and where it meets no fault all instruction sets pool the same.
//
// With clang's -fsanitize=fuzzer it is libFuzzer's; lookup_fuzz_driver.cpp drives it with any compiler.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "coded_table.h"
#include "fenced_lookup.h"
#include "instruction_sets.h"
#include "stored_table.h"

namespace torchrec_mpe {
namespace {

// The numbers that an input's bytes are read as; after the last byte come zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  template <class Word>
  Word word() {
    Word value{};
    const size_t bytes = std::min<size_t>(sizeof(Word), end_ - data_);
    std::memcpy(&value, data_, bytes);
    data_ += bytes;
    return value;
  }

  // An integer in [0, bound) from two bytes.
  int64_t below(int64_t bound) {
    return word<uint16_t>() % bound;
  }

  bool flip() {
    return word<uint8_t>() & 1;
  }

  // Numbers that break arithmetic, those around `limit`, and any.
  int64_t extreme(int64_t limit) {
    switch (word<uint8_t>() % 10) {
      case 0: return INT64_MIN;
      case 1: return INT64_MAX;
      case 2: return INT32_MIN;
      case 3: return INT32_MAX;
      case 4: return -word<uint8_t>();
      case 5: return limit - word<uint8_t>();
      case 6: return limit + word<uint8_t>();
      case 7: return word<int32_t>();
      case 8: return word<int64_t>();
      default: return word<uint8_t>();
    }
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

constexpr int32_t kDims[] = {1, 5, 8, 9, 16, 24, 31, 40, 64, 72, 96, 100, 128, 200, 256, 300};

std::vector<int> row_widths(Input& input, int64_t num_rows) {
  std::vector<int> bits(num_rows);
  const int mode = static_cast<int>(input.below(4));
  const int one = static_cast<int>(input.below(kMaxBits + 1));
  Random random(input.word<uint32_t>());
  for (int64_t i = 0; i < num_rows; ++i) {
    switch (mode) {
      case 0: bits[i] = one; break;
      case 1: bits[i] = static_cast<int>(kMaxBits - i * (kMaxBits + 1) / num_rows); break;
      case 2: bits[i] = static_cast<int>(random.below(kMaxBits + 1)); break;
      default: bits[i] = random.below(4) == 0 ? one : 0; break;
    }
  }
  return bits;
}

void damage(Input& input, StoredTable& table) {
  const int64_t weights = static_cast<int64_t>(table.weights.size()) - kEndPadding;
  switch (input.word<uint8_t>() % 9) {
    case 0:
      table.weights.resize(kEndPadding + input.below(weights + 1));
      break;
    case 1:
    case 2:
      if (!table.directory.empty()) {
        table.directory[input.word<uint32_t>() % table.directory.size()] = input.word<uint8_t>();
      }
      break;
    case 3:
      if (!table.directory.empty()) {
        // The ranks, bases and remapped rows are words.
        const size_t position = input.word<uint32_t>() % (table.directory.size() / 4) * 4;
        put(table.directory, position, static_cast<uint32_t>(input.extreme(table.num_rows)));
      }
      break;
    case 4:
      if (!table.runs.empty()) {
        RunRecord& run = table.runs[input.below(static_cast<int64_t>(table.runs.size()))];
        run.bit = input.flip() ? input.extreme(8 * weights) : run.bit % (1 << 30) + input.word<int8_t>();
      }
      break;
    case 5:
      if (!table.runs.empty()) {
        RunRecord& run = table.runs[input.below(static_cast<int64_t>(table.runs.size()))];
        run.coding = static_cast<uint32_t>(input.extreme(kMaxBits));
        run.row_bits = input.flip() ? 8 * run.coding * static_cast<uint32_t>((table.dim + 7) / 8) : run.row_bits;
      }
      break;
    case 6:
      if (!table.runs.empty()) {
        table.runs[input.below(static_cast<int64_t>(table.runs.size()))].row_bits =
            static_cast<uint32_t>(input.extreme(weights));
      }
      break;
    case 7:
      if (!table.run_starts.empty()) {
        table.run_starts[input.below(static_cast<int64_t>(table.run_starts.size()))] =
            static_cast<int32_t>(input.extreme(table.num_rows));
      }
      break;
    default: {
      const int64_t count = static_cast<int64_t>(table.runs.size());
      if (count > 0) {
        std::swap(table.runs[input.below(count)], table.runs[input.below(count)]);
      }
      break;
    }
  }
}

// A table of which nothing holds but what the binding checks.
StoredTable arbitrary_table(Input& input, int32_t dim, Directory kind) {
  StoredTable table;
  table.dim = dim;
  table.kind = kind;
  // Only a table without a directory can have many rows in little memory.
  const bool many = kind == Directory::Ranked && input.flip();
  table.num_rows = 1 + (many ? input.word<uint32_t>() % INT32_MAX : input.below(2000));
  Random random(input.word<uint32_t>());
  const bool sparse = input.flip();
  const auto fill = [&](std::vector<uint8_t>& bytes, int64_t size) {
    bytes.resize(size);
    for (uint8_t& byte : bytes) {
      byte = sparse && random.below(8) > 0 ? 0 : static_cast<uint8_t>(random.next());
    }
  };
  fill(table.weights, kEndPadding + input.below(4000));
  const int64_t bitmap = lines(table.num_rows, kBitmapRows) * kLineBytes;
  switch (kind) {
    case Directory::Ranked: break;
    case Directory::Remap: fill(table.directory, 4 * table.num_rows); break;
    case Directory::Nibble: fill(table.directory, lines(table.num_rows, kNibbleRows) * kLineBytes); break;
    case Directory::Bitmap: fill(table.directory, bitmap); break;
    case Directory::BitmapNibble: fill(table.directory, bitmap + input.below(4) * kLineBytes); break;
    case Directory::Wavelet: break;  // of coded tables
  }
  const bool has_runs = kind != Directory::Nibble && kind != Directory::BitmapNibble;
  const int64_t num_runs = has_runs ? 1 + input.below(20) : input.below(20);
  const int64_t weights = static_cast<int64_t>(table.weights.size());
  for (int64_t k = 0; k < num_runs; ++k) {
    const uint32_t bits = static_cast<uint32_t>(input.flip() ? input.below(kMaxBits + 2) : input.extreme(kMaxBits));
    const uint32_t row_bits = 8 * bits * static_cast<uint32_t>((dim + 7) / 8);
    table.runs.push_back({input.extreme(8 * weights), input.flip() ? row_bits : input.word<uint32_t>(), bits});
    table.run_starts.push_back(static_cast<int32_t>(input.extreme(table.num_rows)));
  }
  for (int bits = 0; bits <= kMaxBits; ++bits) {
    table.alpha.push_back(random.unit());
  }
  for (int32_t d = 0; d < dim; ++d) {
    table.beta.push_back(random.unit());
  }
  return table;
}

StoredTable coded_table(Input& input, int32_t dim, Random& random) {
  const int32_t components = static_cast<int32_t>(input.below(kMaxComponents + 1));
  const int64_t count = 1 + input.below(input.flip() ? 12 : 90);
  const int plain_of_8 = static_cast<int>(input.below(9));
  const Directory kind = kCodedDirectories[input.below(3)];
  const CodedRows rows(dim, components, random_runs(count, 1 + input.below(20), plain_of_8, random), kind, random);
  StoredTable table = store(rows, kind, random);
  for (int64_t k = input.word<uint8_t>() % 4; k > 0; --k) {
    damage(input, table);
  }
  if (input.word<uint8_t>() % 16 == 0) {
    table.levels.resize(input.below(static_cast<int64_t>(table.levels.size()) + 1));
  }
  if (input.word<uint8_t>() % 8 == 0) {
    table.runs[input.below(count)].coding ^= input.word<uint32_t>() & input.word<uint32_t>();
  }
  return table;
}

StoredTable read_table(Input& input) {
  const int32_t dim = kDims[input.below(16)];
  const Directory kind = static_cast<Directory>(input.below(5));
  const int choice = input.word<uint8_t>() % 16;
  if (choice % 4 == 0) {
    return arbitrary_table(input, dim, kind);
  }
  Random random(input.word<uint32_t>());
  if (choice < 8) {
    return coded_table(input, dim, random);
  }
  const Rows rows(dim, row_widths(input, 1 + input.below(dim > 100 ? 200 : 1000)), random);
  StoredTable table = store(rows, kind, random);
  for (int64_t k = input.word<uint8_t>() % 4; k > 0; --k) {
    damage(input, table);
  }
  return table;
}

LookupInputs read_inputs(Input& input, const PackedTable& table) {
  LookupInputs inputs;
  const int64_t num_features = 1 + input.below(2);
  inputs.batch = 1 + input.below(6);
  inputs.weighted = input.flip();
  inputs.indices_64 = input.flip();
  inputs.offsets_64 = input.flip();
  inputs.output_type = static_cast<OutputType>(input.below(3));
  inputs.output_stride = num_features * table.embedding_dim;
  for (int64_t f = 0; f < num_features; ++f) {
    inputs.features.push_back({&table, f * table.embedding_dim, !inputs.weighted && input.flip()});
  }
  const bool bad_ids = input.word<uint8_t>() % 4 == 0;
  const bool bad_offsets = input.word<uint8_t>() % 8 == 0;
  Random random(input.word<uint32_t>());
  inputs.offsets = {0};
  for (int64_t bag = 0; bag < num_features * inputs.batch; ++bag) {
    // Some bags are longer than a segment and the ring.
    const int64_t length = input.below(8) == 0 ? input.below(400) : input.below(40);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t choice = random.below(20);
      inputs.ids.push_back(choice == 0   ? -1
                           : choice == 1 ? table.num_rows - 1
                           : bad_ids && choice == 2 ? static_cast<int64_t>(random.next()) >> random.below(64)
                                                    : random.below(table.num_rows));
      if (inputs.weighted) {
        inputs.weights.push_back(random.below(8) == 0 ? 0.0f : random.unit());
      }
    }
    inputs.offsets.push_back(static_cast<int64_t>(inputs.ids.size()));
  }
  if (bad_offsets) {
    const int64_t last = static_cast<int64_t>(inputs.ids.size());
    for (int64_t k = 1 + input.below(3); k > 0; --k) {
      inputs.offsets[input.below(static_cast<int64_t>(inputs.offsets.size()))] = input.extreme(last);
    }
  }
  return inputs;
}

[[noreturn]] void fail(const char* set, const char* message) {
  std::fprintf(stderr, "FAILED lookup_fuzz, %s: %s\n", set, message);
  std::abort();
}

bool has_fault(const LookupResult& result) {
  return std::any_of(result.faults.begin(), result.faults.end(), [](const Faults& faults) {
    return faults.bad_ids > 0 || faults.bad_offset >= 0 || faults.damaged_feature >= 0;
  });
}

void compare(const LookupResult& expected, const LookupResult& got, int64_t elements, const char* set) {
  // Every weight, offset and step times half its codes is below 256 in magnitude; bags have at most 400 rows.
  const double tolerance = got.type == OutputType::Float ? 0.005 : 0.01;
  const double unit = got.type == OutputType::Float ? 0.0 : got.type == OutputType::Half ? 0x1p-10 : 0x1p-7;
  for (int64_t i = 0; i < elements; ++i) {
    const double a = expected.at(i);
    const double b = got.at(i);
    // What overflows in one instruction set's rounding to float16 may just not in another's.
    const bool near = std::fabs(a - b) <= tolerance + unit * std::fabs(a);
    const bool both_nan = std::isnan(a) && std::isnan(b);
    if (!near && !both_nan && a != b) {
      std::fprintf(stderr, "element %ld is %.9g, by the scalar kernel %.9g\n", static_cast<long>(i), b, a);
      fail(set, "it pools something else");
    }
  }
}

void look_up(Input& input) {
  const StoredTable stored = read_table(input);
  const FencedTable table(stored);
  if (!table.admitted()) {
    return;
  }
  const LookupInputs inputs = read_inputs(input, table.view());
  FencedLookup lookup(inputs);
  const int64_t bags = static_cast<int64_t>(inputs.offsets.size()) - 1;
  const std::vector<int64_t> bounds{0, input.below(bags + 1), bags};
  const std::vector<InstructionSet> sets = instruction_sets();
  LookupResult scalar_result{};
  for (const InstructionSet& set : sets) {
    const LookupResult whole = lookup.run(set.lookup_bags, {0, bags});
    const LookupResult split = lookup.run(set.lookup_bags, bounds);
    if (!has_fault(whole) && !has_fault(split) && whole.bytes != split.bytes) {
      fail(set.name, "pieces differ from the whole");
    }
    if (set.lookup_bags == sets[0].lookup_bags) {
      scalar_result = whole;
      continue;
    }
    const Faults& faults = whole.faults[0];
    const Faults& expected = scalar_result.faults[0];
    if (faults.bad_ids != expected.bad_ids || faults.first_bad_id != expected.first_bad_id ||
        faults.bad_id_feature != expected.bad_id_feature || faults.bad_offset != expected.bad_offset) {
      fail(set.name, "it reports other ids or offsets");
    }
    if (!has_fault(whole) && !has_fault(scalar_result)) {
      compare(scalar_result, whole, inputs.batch * inputs.output_stride, set.name);
    }
  }
}

}  // namespace
}  // namespace torchrec_mpe

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  torchrec_mpe::Input input(data, size);
  torchrec_mpe::look_up(input);
  return 0;
}
