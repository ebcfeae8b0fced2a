// Lookups of tables of known codes by every instruction set, and what is expected of them.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "fenced_lookup.h"
#include "instruction_sets.h"
#include "stored_table.h"

namespace torchrec_mpe {

inline std::string current_case;

inline __attribute__((format(printf, 2, 3))) void check(bool condition, const char* message, ...) {
  if (condition) {
    return;
  }
  std::fprintf(stderr, "FAILED %s: ", current_case.c_str());
  va_list arguments;
  va_start(arguments, message);
  std::vfprintf(stderr, message, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::exit(1);
}

inline __attribute__((format(printf, 1, 2))) void set_case(const char* format, ...) {
  char text[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  current_case = text;
}

// --- what is looked up -----------------------------------------------------------------------------------------------

// Bags around the lookup's blocks of 32 rows, segments of 128 and ring of 256.
inline std::vector<int64_t> bag_lengths(int64_t feature) {
  return feature % 2 == 0 ? std::vector<int64_t>{0, 1, 2, 31, 0, 33, 129, 300, 5, 0}
                          : std::vector<int64_t>{7, 0, 128, 256, 1, 1, 257, 32, 0, 64};
}

// Two features of one table, the second with a column of output before and after it that nobody writes.
inline LookupInputs make_inputs(const PackedTable& table, bool mean, bool weighted, Random& random) {
  LookupInputs inputs;
  const int64_t dim = table.embedding_dim;
  inputs.features = {{&table, 0, mean}, {&table, dim + 1, false}};
  inputs.batch = static_cast<int64_t>(bag_lengths(0).size());
  inputs.output_stride = 2 * dim + 2;
  inputs.weighted = weighted;
  inputs.offsets = {0};
  for (int64_t f = 0; f < 2; ++f) {
    for (const int64_t length : bag_lengths(f)) {
      for (int64_t i = 0; i < length; ++i) {
        const int64_t choice = random.below(16);
        inputs.ids.push_back(choice == 0 ? -1 : choice == 1 ? table.num_rows - 1 : random.below(table.num_rows));
        if (weighted) {
          inputs.weights.push_back(random.unit());
        }
      }
      inputs.offsets.push_back(static_cast<int64_t>(inputs.ids.size()));
    }
  }
  return inputs;
}

inline std::vector<int64_t> all_bags(const LookupInputs& inputs) {
  return {0, static_cast<int64_t>(inputs.offsets.size()) - 1};
}

// --- what is expected ------------------------------------------------------------------------------------------------

// Pooled in double precision, and the sum without signs of what may have been added, of which rounding errors are a
// part.
template <class Meaning>
Element pool_element(const LookupInputs& inputs, const Meaning& rows, const StoredTable& table, int64_t bag, bool mean,
                     int32_t d) {
  Element pooled;
  const int64_t first = inputs.offsets[bag];
  const int64_t last = inputs.offsets[bag + 1];
  for (int64_t i = first; i < last; ++i) {
    const int64_t id = inputs.ids[i];
    if (id == -1) {
      continue;
    }
    const double weight = inputs.weighted ? inputs.weights[i] : 1.0;
    const Element element = element_of(rows, table, id < 0 || id >= rows.size() ? 0 : id, d);
    pooled.value += weight * element.value;
    pooled.magnitude += std::fabs(weight) * element.magnitude;
  }
  if (mean && last > first) {
    pooled.value /= static_cast<double>(last - first);
    pooled.magnitude /= static_cast<double>(last - first);
  }
  return pooled;
}

inline double rounding_unit(OutputType type) {
  return type == OutputType::Float ? 0x1p-24 : type == OutputType::Half ? 0x1p-11 : 0x1p-8;
}

template <class Meaning>
void check_bags(const LookupInputs& inputs, const Meaning& rows, const StoredTable& table, const LookupResult& result) {
  const int64_t dim = table.dim;
  for (size_t f = 0; f < inputs.features.size(); ++f) {
    const Feature& feature = inputs.features[f];
    for (int64_t b = 0; b < inputs.batch; ++b) {
      const int64_t bag = static_cast<int64_t>(f) * inputs.batch + b;
      const double added =
          static_cast<double>(inputs.offsets[bag + 1] - inputs.offsets[bag]) + 4.0 + table.components;
      for (int32_t d = 0; d < dim; ++d) {
        const Element expected = pool_element(inputs, rows, table, bag, feature.mean, d);
        const double got = result.at(b * inputs.output_stride + feature.column + d);
        const double tolerance = added * 0x1p-23 * expected.magnitude +
                                 rounding_unit(result.type) * std::fabs(expected.value) + 0x1p-24;
        check(std::fabs(got - expected.value) <= tolerance, "feature %zu, bag %d, element %d is %.9g and not %.9g", f,
              static_cast<int>(b), d, got, expected.value);
      }
      check(result.untouched(b * inputs.output_stride + dim) && result.untouched((b + 1) * inputs.output_stride - 1),
            "bag %d: a column of no feature is written", static_cast<int>(b));
    }
  }
}

inline void check_no_faults(const LookupResult& result) {
  for (const Faults& faults : result.faults) {
    check(faults.bad_ids == 0 && faults.bad_offset == -1 && faults.damaged_feature == -1,
          "a sound table has faults: %d bad ids, bad offset %d, damaged feature %d", static_cast<int>(faults.bad_ids),
          static_cast<int>(faults.bad_offset), static_cast<int>(faults.damaged_feature));
  }
}

inline int64_t lookups_run = 0;

// All dtypes of ids, offsets and output come by over a few tables: `turn` picks them.
template <class Meaning>
void look_up(const Meaning& rows, const StoredTable& table, int turn, Random& random) {
  const FencedTable fenced(table);
  for (int pooling = 0; pooling < 3; ++pooling) {
    LookupInputs inputs = make_inputs(fenced.view(), pooling == 1, pooling == 2, random);
    const int types = turn * 5 + pooling;
    inputs.indices_64 = types % 2 == 0;
    inputs.offsets_64 = types / 2 % 2 == 0;
    inputs.output_type = static_cast<OutputType>((types / 4 + pooling) % 3);
    const int64_t bags = all_bags(inputs)[1];
    std::vector<int64_t> pieces{0, random.below(bags), random.below(bags), random.below(bags), bags};
    std::sort(pieces.begin(), pieces.end());
    const std::string table_case = current_case;
    FencedLookup lookup(inputs);
    for (const InstructionSet& set : instruction_sets()) {
      set_case("%s, pooling %d, int%d ids, int%d offsets, output %d, %s", table_case.c_str(), pooling,
               inputs.indices_64 ? 64 : 32, inputs.offsets_64 ? 64 : 32, static_cast<int>(inputs.output_type),
               set.name);
      const LookupResult whole = lookup.run(set.lookup_bags, all_bags(inputs));
      check_no_faults(whole);
      check_bags(inputs, rows, table, whole);
      const LookupResult split = lookup.run(set.lookup_bags, pieces);
      check_no_faults(split);
      check(split.bytes == whole.bytes, "pieces from bags %d, %d and %d differ from the whole",
            static_cast<int>(pieces[1]), static_cast<int>(pieces[2]), static_cast<int>(pieces[3]));
      ++lookups_run;
    }
    current_case = table_case;
  }
}

// What a lookup of a damaged table must do: not leave its memory, and say that it is damaged where it can be seen.
inline void check_damaged(const StoredTable& table, bool visible = true) {
  Random random(5);
  const FencedTable fenced(table);
  const LookupInputs inputs = make_inputs(fenced.view(), false, false, random);
  FencedLookup lookup(inputs);
  const std::string damage = current_case;
  for (const InstructionSet& set : instruction_sets()) {
    set_case("%s, dim %d, directory %d, %s", damage.c_str(), table.dim, static_cast<int>(table.kind), set.name);
    const LookupResult result = lookup.run(set.lookup_bags, all_bags(inputs));
    check(!visible || result.faults[0].damaged_feature >= 0, "the damage is not reported");
  }
}

// The last line of a test.
inline void report(const char* test) {
  std::printf("%s: %ld lookups equal the expected bags;", test, static_cast<long>(lookups_run));
  for (const InstructionSet& set : instruction_sets()) {
    std::printf(" %s", set.name);
  }
  std::printf("\n");
}

}  // namespace torchrec_mpe
