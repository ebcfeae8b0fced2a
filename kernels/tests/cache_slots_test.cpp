// Tests of assigning cache slots, for every instruction set of the machine: a search of all slots finds what it says,
// the scalar one assigns the same, undoing leaves every byte as it was, no byte beyond any buffer. Built with
// AddressSanitizer by `make test-cpp`.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "fenced_buffer.h"
#include "instruction_sets.h"
#include "random_source.h"

namespace torchrec_mpe {
namespace {

// A directory whose buffers all end where a page does.
struct Directory {
  Directory(int64_t num_rows, int64_t sets, int64_t spill, bool lfu)
      : rows(kWays * sets + spill),
        batches(rows.size()),
        dirty(rows.size()),
        counts(lfu ? rows.size() : 0),
        row_counts(lfu ? num_rows : 0),
        statistics(6) {
    std::fill_n(rows.data(), rows.size(), -1);
    table.slot_rows = rows.data();
    table.slot_batches = batches.data();
    table.slot_dirty = dirty.data();
    table.slot_counts = lfu ? counts.data() : nullptr;
    table.row_counts = lfu ? row_counts.data() : nullptr;
    table.statistics = statistics.data();
    table.slots = static_cast<int64_t>(rows.size());
    table.sets = sets;
    table.num_rows = num_rows;
    table.seed = 99;
  }

  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> all;
    const auto append = [&](const void* data, size_t size) {
      all.insert(all.end(), static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + size);
    };
    append(rows.data(), 4 * rows.size());
    append(batches.data(), 4 * batches.size());
    append(dirty.data(), dirty.size());
    append(counts.data(), counts.size());
    append(row_counts.data(), row_counts.size());
    append(statistics.data(), 8 * statistics.size());
    return all;
  }

  FencedBuffer<int32_t> rows, batches;
  FencedBuffer<uint8_t> dirty, counts, row_counts;
  FencedBuffer<int64_t> statistics;
  CachedTable table{};
};

int fail(const char* what, const InstructionSet& set, const Directory& directory, int batch) {
  std::fprintf(stderr, "FAILED cache slots, %s: %d sets, %s, batch %d, %s\n", what,
               static_cast<int>(directory.table.sets), directory.table.is_lfu() ? "LFU" : "LRU", batch, set.name);
  return 1;
}

// What a search of all slots finds wrong, or null.
const char* wrong(const Directory& directory, const Assignment& assignment, const std::map<int32_t, int32_t>& before,
                  const FencedBuffer<int64_t>& ids, const FencedBuffer<int64_t>& locations) {
  const CachedTable& table = assignment.table;
  std::map<int32_t, int32_t> batch_of;  // of each cached row
  for (int64_t slot = 0; slot < table.slots; ++slot) {
    const int32_t row = directory.rows.data()[slot];
    if (row >= 0 && !batch_of.emplace(row, directory.batches.data()[slot]).second) {
      return "a row is in two slots";
    }
    if (row >= 0 && slot < table.first_spill() && row % table.sets != slot / kWays) {
      return "a row is not in its set";
    }
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t slot = locations.data()[i];
    if (slot < 0 || slot >= table.slots || directory.rows.data()[slot] != ids.data()[i]) {
      return "an id is not in its slot";
    }
    if (directory.batches.data()[slot] != table.batch) {
      return "a slot that was looked up has another batch";
    }
  }
  for (const auto& [row, batch] : before) {
    if (batch >= table.oldest_in_flight && batch_of.count(row) == 0) {
      return "a row in flight has lost its slot";
    }
  }
  return nullptr;
}

std::map<int32_t, int32_t> batches_of(const Directory& directory) {
  std::map<int32_t, int32_t> batches;
  for (size_t slot = 0; slot < directory.rows.size(); ++slot) {
    if (directory.rows.data()[slot] >= 0) {
      batches[directory.rows.data()[slot]] = directory.batches.data()[slot];
    }
  }
  return batches;
}

int run() {
  int batches = 0, undone = 0;
  for (const int64_t sets : {1, 2, 7, 33}) {
    for (const int64_t num_rows : {1, 40, 5000}) {
      for (const int64_t spill : {0, 9, 2000}) {
        for (const bool lfu : {false, true}) {
          std::vector<std::vector<uint8_t>> expected;  // after each batch
          for (const InstructionSet& set : instruction_sets()) {
            Random random(static_cast<uint64_t>(sets * num_rows + spill));
            Directory directory(num_rows, sets, spill, lfu);
            for (int batch = 1; batch <= 10; ++batch) {
              const FencedBuffer<int64_t> ids(static_cast<size_t>(random.below(1500)));
              const FencedBuffer<int64_t> locations(ids.size());
              for (size_t i = 0; i < ids.size(); ++i) {
                ids.data()[i] = i % 3 == 0 ? random.below(num_rows) : random.below(num_rows / 8 + 1);
              }
              const std::vector<uint8_t> untouched = directory.bytes();
              const std::map<int32_t, int32_t> before = batches_of(directory);
              Assignment assignment;
              assignment.table = directory.table;
              assignment.table.batch = batch;
              assignment.table.oldest_in_flight = std::max(0, batch - static_cast<int>(random.below(4)));
              set.assign_slots(assignment, ids.data(), static_cast<int64_t>(ids.size()), locations.data());
              const bool fits = assignment.needed_spill <= spill;
              if (!fits || batch % 4 == 0) {
                undo(assignment);
                ++undone;
                if (directory.bytes() != untouched) {
                  return fail("undoing leaves something", set, directory, batch);
                }
              } else {
                commit(assignment, batch % 3 != 0);
                const char* const what = wrong(directory, assignment, before, ids, locations);
                if (what != nullptr) {
                  return fail(what, set, directory, batch);
                }
                const auto misses = assignment.misses.size();
                const FencedBuffer<int32_t> moves(2 * static_cast<size_t>(assignment.num_written) + 2 * misses);
                int32_t* const fetched = moves.data() + 2 * assignment.num_written;
                list_moves(assignment, moves.data(), moves.data() + assignment.num_written, fetched, fetched + misses);
                for (size_t m = 0; m < misses; ++m) {
                  if (directory.rows.data()[fetched[m]] != fetched[misses + m]) {
                    return fail("a fetched row is not in its slot", set, directory, batch);
                  }
                }
              }
              const size_t number = static_cast<size_t>(batch) - 1;
              if (expected.size() == number) {
                expected.push_back(directory.bytes());
              } else if (directory.bytes() != expected[number]) {
                return fail("the directory is not that of scalar", set, directory, batch);
              }
              ++batches;
            }
          }
        }
      }
    }
  }
  std::printf("cache_slots_test: %d batches have their slots, %d of them undone\n", batches, undone);
  return 0;
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  return torchrec_mpe::run();
}
