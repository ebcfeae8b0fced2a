// Tests of lookups against writes of the same rows, for every instruction set of the machine: a lookup finds each row
// as one write left it, and no older than when it began. Built with ThreadSanitizer, and without, by `make test-cpp`.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "instruction_sets.h"
#include "row_lock.h"
#include "stored_table.h"

namespace torchrec_mpe {
namespace {

constexpr int32_t kDim = 328;  // 328 bytes at 8 bits: every row lies in at least 6 cache lines
constexpr int64_t kRows = 3000;  // more than a writer writes under one hold
constexpr int kWriters = 2;
constexpr int kReaders = 4;
constexpr int kBags = 64;

[[noreturn]] void fail(const char* message, const char* instruction_set) {
  std::fprintf(stderr, "FAILED %s: %s\n", instruction_set, message);
  std::exit(1);
}

// All codes of a row are the last 8 bits of the number of the write it comes from; 0 before the first.
struct Table {
  StoredTable stored;
  std::vector<int64_t> starts;
  PackedTable view{};
  // Of each writer: writes that have begun, and that are complete.
  std::atomic<int64_t> begun[kWriters] = {};
  std::atomic<int64_t> complete[kWriters] = {};

  Table() : starts(kRows) {
    Random random(1);
    Rows rows(kDim, std::vector<int>(kRows, 8), random);
    std::fill(rows.codes.begin(), rows.codes.end(), uint8_t{0});
    stored = store(rows, Directory::Ranked, random);
    std::fill(stored.beta.begin(), stored.beta.end(), 0.0f);
    stored.alpha[8] = 1.0f;
    for (int64_t row = 0; row < kRows; ++row) {
      starts[row] = (stored.runs[0].bit + row * static_cast<int64_t>(stored.runs[0].row_bits)) / 8;
    }
    view.weights = stored.weights.data();
    view.weights_bytes = static_cast<int64_t>(stored.weights.size());
    view.num_rows = kRows;
    view.embedding_dim = kDim;
    view.blocks = kDim / 8;
    view.kind = Directory::Ranked;
    view.runs = stored.runs.data();
    view.run_starts = stored.run_starts.data();
    view.num_runs = static_cast<int32_t>(stored.runs.size());
    view.alpha = stored.alpha.data();
    view.beta = stored.beta.data();
  }

  const void* storage() const {
    return stored.weights.data();
  }
};

// Rows writer, writer + kWriters, ...: each row has one writer, and neighbours have different ones.
void write_until(Table& table, int writer, const std::atomic<bool>& stop) {
  std::vector<int64_t> starts;
  for (int64_t row = writer; row < kRows; row += kWriters) {
    starts.push_back(table.starts[row]);
  }
  std::vector<uint8_t> rows(starts.size() * kDim);
  for (int64_t write = 1; !stop; ++write) {
    std::memset(rows.data(), static_cast<int>(write & 255), rows.size());
    table.begun[writer] = write;
    write_rows(table.storage(), table.stored.weights.data(),
               {starts.data(), rows.data(), static_cast<int64_t>(starts.size()), kDim});
    table.complete[writer] = write;
  }
}

// Looks up bags of one row.
void read_until(const Table& table, LookupBags lookup_bags, const char* instruction_set, uint64_t seed,
                const std::atomic<bool>& stop, std::atomic<int64_t>& changed) {
  Random random(seed);
  std::vector<int64_t> ids(kBags);
  std::vector<int64_t> offsets(kBags + 1);
  std::iota(offsets.begin(), offsets.end(), 0);
  std::vector<float> output(kBags * kDim);
  const Feature feature{&table.view, 0, false};
  Lookup lookup{};
  lookup.features = &feature;
  lookup.num_features = 1;
  lookup.batch = kBags;
  lookup.indices = ids.data();
  lookup.indices_64 = true;
  lookup.num_indices = kBags;
  lookup.offsets = offsets.data();
  lookup.offsets_64 = true;
  lookup.output = output.data();
  lookup.output_type = OutputType::Float;
  lookup.output_stride = kDim;
  int64_t last_complete = -1;
  while (!stop) {
    int64_t complete[kWriters];
    for (int writer = 0; writer < kWriters; ++writer) {
      complete[writer] = table.complete[writer];
    }
    for (int64_t& id : ids) {
      id = random.below(kRows);
    }
    Faults faults;
    {
      const SharedRowLock lock(table.storage());
      lookup_bags(lookup, 0, kBags, faults);
    }
    for (int64_t bag = 0; bag < kBags; ++bag) {
      const float* row = output.data() + bag * kDim;
      for (int32_t d = 1; d < kDim; ++d) {
        if (row[d] != row[0]) {
          fail("a row is half of one write and half of another", instruction_set);
        }
      }
      const int writer = static_cast<int>(ids[bag] % kWriters);
      const int64_t found = static_cast<int64_t>(row[0]) + 128;
      const int64_t newer = (found - complete[writer]) & 255;
      if (newer > table.begun[writer] - complete[writer]) {
        fail("a row is older than the last write before the lookup, or of no write", instruction_set);
      }
    }
    changed += complete[0] != last_complete;
    last_complete = complete[0];
  }
}

// Until enough lookups have met enough writes: a fraction of a second, longer under ThreadSanitizer.
void lookups_against_writes(const InstructionSet& instruction_set) {
  Table table;
  std::atomic<bool> stop{false};
  std::atomic<int64_t> changed{0};
  std::vector<std::thread> threads;
  for (int writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&, writer] { write_until(table, writer, stop); });
  }
  for (int reader = 0; reader < kReaders; ++reader) {
    threads.emplace_back([&, reader] {
      read_until(table, instruction_set.lookup_bags, instruction_set.name, 100 + reader, stop, changed);
    });
  }
  const auto met = [&] { return table.complete[0] >= 25 && table.complete[1] >= 25 && changed >= 150; };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!met() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  stop = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  std::printf("%s: %ld and %ld writes of %ld rows, lookups met %ld of them\n", instruction_set.name,
              static_cast<long>(table.complete[0]), static_cast<long>(table.complete[1]),
              static_cast<long>(kRows / kWriters), static_cast<long>(changed));
  if (!met()) {
    fail("lookups and writes did not meet", instruction_set.name);
  }
}

void last_of_equal_starts_stays() {
  Table table;
  const std::vector<int64_t> starts(2, table.starts[5]);
  std::vector<uint8_t> rows(2 * kDim, 7);
  std::fill(rows.begin() + kDim, rows.end(), uint8_t{9});
  write_rows(table.storage(), table.stored.weights.data(), {starts.data(), rows.data(), 2, kDim});
  for (int64_t byte = 0; byte < static_cast<int64_t>(table.stored.weights.size()); ++byte) {
    const bool inside = byte >= table.starts[5] && byte < table.starts[5] + kDim;
    if (table.stored.weights[byte] != (inside ? 9 : 0)) {
      fail("a write of one row twice is not the last one's bytes in that row alone", "write_rows");
    }
  }
}

// A child of a process that reads and writes can do both: it finds the locks free and no row half written.
// ThreadSanitizer supports no threads in such a child, and no 256 locks at once.
void a_forked_child_reads_and_writes() {
#ifndef __SANITIZE_THREAD__
  Table table;
  std::atomic<bool> stop{false};
  std::atomic<int64_t> changed{0};
  const InstructionSet scalar = instruction_sets()[0];
  std::thread writer([&] { write_until(table, 0, stop); });
  std::thread reader([&] { read_until(table, scalar.lookup_bags, scalar.name, 1, stop, changed); });
  while (table.complete[0] < 2) {
    std::this_thread::yield();
  }
  for (int fork_number = 0; fork_number < 50; ++fork_number) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      for (int64_t row = 0; row < kRows; ++row) {
        const uint8_t* bytes = table.stored.weights.data() + table.starts[row];
        if (std::any_of(bytes, bytes + kDim, [&](uint8_t byte) { return byte != bytes[0]; })) {
          _exit(2);
        }
      }
      const std::vector<uint8_t> rows(kDim, 1);
      write_rows(table.storage(), table.stored.weights.data(), {table.starts.data(), rows.data(), 1, kDim});
      const SharedRowLock lock(table.storage());
      _exit(table.stored.weights[table.starts[0]] == 1 ? 0 : 3);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
      std::fprintf(stderr, "child %d: status %d\n", fork_number, status);
      fail("a forked child did not find whole rows and free locks", "fork");
    }
  }
  stop = true;
  writer.join();
  reader.join();
#endif
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  torchrec_mpe::last_of_equal_starts_stays();
  torchrec_mpe::a_forked_child_reads_and_writes();
  for (const torchrec_mpe::InstructionSet& instruction_set : torchrec_mpe::instruction_sets()) {
    torchrec_mpe::lookups_against_writes(instruction_set);
  }
  std::puts("update_test: ok");
}
