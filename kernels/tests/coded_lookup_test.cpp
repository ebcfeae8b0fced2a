// What lookup_test.cpp is, for coded tables. Built with AddressSanitizer by `make test-cpp`.
#include "coded_table.h"
#include "lookup_checks.h"

namespace torchrec_mpe {
namespace {

// Rows of both kinds in up to 80 runs, and rows of one kind alone; the last row ends with the weights.
void test_coded_tables() {
  Random random(11);
  int turn = 0;
  for (const int32_t dim : {1, 3, 8, 16, 33, 64, 100, 128, 256, 300}) {
    for (const int32_t components : {0, 1, 2, 4, 5, 8, 16}) {
      for (const int plain_of_8 : {0, 3, 8}) {
        const int64_t counts[] = {1, 2, 9, 16, 17, 30, 33, 64, 65, 80};
        const int64_t count = counts[turn % 10];
        const Directory kind = kCodedDirectories[turn % 3];
        set_case("coded: dim %d, %d components, %d runs, %d in 8 plain", dim, components, static_cast<int>(count),
                 plain_of_8);
        const CodedRows rows(dim, components, random_runs(count, turn % 7 == 0 ? 1 : 40, plain_of_8, random), kind,
                             random);
        look_up(rows, store(rows, kind, random), turn, random);
        ++turn;
      }
    }
  }
}

// Every width of every block of components alone, and all of 8 bits.
void test_widths_of_components() {
  Random random(12);
  for (int bits = 0; bits <= kMaxBits; ++bits) {
    for (int block = 0; block <= kComponentBlocks; ++block) {
      CodedRun run{37, true, 0, {}};
      for (int k = 0; k < kComponentBlocks; ++k) {
        run.block_bits[k] = block == kComponentBlocks || block == k ? bits : 0;
      }
      set_case("widths: block %d of %d bits", block, bits);
      const CodedRows rows(16, 16, {run}, Directory::Ranked, random);
      look_up(rows, store(rows, Directory::Ranked, random), bits, random);
    }
  }
}

// A bit beyond 32 bits: a run behind 600 MB that nobody reads.
void test_far_bits() {
  Random random(13);
  const CodedRun run{40, true, 0, {3, 1, 2, 5, 0}};
  CodedRun far = run;
  far.rows = 50;
  const CodedRows rows(24, 8, {run, far, {10, false, 4, {}}}, Directory::Ranked, random);
  StoredTable table = store(rows, Directory::Ranked, random);
  const int64_t gap = int64_t{600} << 20;
  const int64_t first = 40 * rows.row_bits(0) / 8;
  std::vector<uint8_t> weights(table.weights.size() + gap);
  const auto from = table.weights.begin() + table.first_byte;
  std::copy(table.weights.begin(), from + first, weights.begin());
  std::copy(from + first, table.weights.end(), weights.begin() + table.first_byte + first + gap);
  table.weights = std::move(weights);
  for (int k = 1; k < 3; ++k) {
    table.runs[k].bit += 8 * gap;
  }
  set_case("far bits");
  look_up(rows, table, 1, random);
}

// Records, levels and a directory that lie, of coded tables of one kind of rows and of both.
void test_damaged_coded_tables() {
  Random random(14);
  for (const int32_t dim : {8, 16, 64, 300}) {
    for (const int64_t count : {3, 30, 70}) {
      for (const int plain_of_8 : {0, 4, 8}) {
        std::vector<CodedRun> runs = random_runs(count, 6, plain_of_8, random);
        runs[0] = plain_of_8 == 8 ? CodedRun{300, false, 4, {}} : CodedRun{300, true, 0, {4, 4, 4, 4, 4}};
        const CodedRows rows(dim, 8, runs, Directory::Ranked, random);
        const StoredTable sound = store(rows, Directory::Ranked, random);
        StoredTable table = sound;
        set_case("coded: weights cut short");
        table.weights.resize(kEndPadding);
        check_damaged(table);
        for (const int64_t bit : {int64_t{-1000}, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
          set_case("coded: run at bit %lld", static_cast<long long>(bit));
          table = sound;
          table.runs[0].bit = bit;
          check_damaged(table);
        }
        for (const uint32_t coding : {9u, 15u, 0x7fffffffu, 0x80000009u, 0x80000090u, 0x80900000u, 0xffffffffu}) {
          set_case("coding 0x%x", coding);
          table = sound;
          table.runs[0].coding = coding;
          check_damaged(table);
        }
        set_case("coded: row bits");
        table = sound;
        table.runs[0].row_bits += 1;
        check_damaged(table);
        set_case("coded: no levels");
        table = sound;
        table.levels.clear();
        check_damaged(table);
        set_case("coded: starts out of order");
        table = sound;
        std::swap(table.run_starts[1], table.run_starts[2]);
        check_damaged(table, false);
      }
    }
  }
  for (const int64_t count : {2, 30}) {
    const CodedRows rows(16, 8, random_runs(count, 40, 4, random), Directory::Wavelet, random);
    const StoredTable sound = store(rows, Directory::Wavelet, random);
    Split root;
    std::memcpy(&root, sound.directory.data(), sizeof(root));
    for (const uint64_t rank : {uint64_t{1000000}, uint64_t{0x7fffffff}, ~uint64_t{0}}) {
      set_case("wavelet: rank %llu before a line", static_cast<unsigned long long>(rank));
      StoredTable table = sound;
      put(table.directory, root.line * kLineBytes, rank);
      check_damaged(table);
    }
  }
  set_case("transformed rows of a table that is not coded");
  const Rows rows(16, std::vector<int>(50, 4), random);
  StoredTable table = store(rows, Directory::Ranked, random);
  table.runs[0].coding = kTransformed;
  check_damaged(table);
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  using namespace torchrec_mpe;
  test_coded_tables();
  test_widths_of_components();
  test_far_bits();
  test_damaged_coded_tables();
  report("coded_lookup_test");
  return 0;
}
