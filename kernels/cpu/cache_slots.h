// Which cache slot each looked-up row is in, and which rows have to change place for it.
// torchrec_mpe/ops/cache_slots.py says what is computed, torchrec_mpe/ops/reference/cache_slots.py defines it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simd_targets.h"

namespace torchrec_mpe {

constexpr int64_t kWays = 32;  // slots of a set

// A table's directory, and what is asked of it.
struct CachedTable {
  int32_t* slot_rows;     // [slots]
  int32_t* slot_batches;  // [slots]
  uint8_t* slot_dirty;    // [slots]
  uint8_t* slot_counts;   // [slots]; null with LRU
  uint8_t* row_counts;    // [num_rows]; null with LRU
  int64_t* statistics;    // [6]
  int64_t slots, sets, num_rows;
  int64_t first_row;
  uint64_t seed;
  int32_t batch, oldest_in_flight;

  bool is_lfu() const {
    return row_counts != nullptr;
  }
  int64_t first_spill() const {
    return kWays * sets;
  }
};

// A row's slot and number, as they were when it lost the slot.
struct LostSlot {
  int32_t slot, row;
  int32_t batch;
  uint8_t dirty, count;
};

// A row of the batch that was in a slot.
struct Hit {
  int32_t slot;
  int32_t batch;  // the last that looked it up before
  int64_t lookups;
};

// A row of the batch that was in none. `before` is what its slot held, row -1 if nothing.
struct Miss {
  int32_t row;
  int64_t lookups;
  LostSlot before;  // slot -1: the spill area is too small
};

// An id of a row that was in no slot.
struct MissingId {
  int64_t position;
  int32_t miss;
};

// Finds rows that are in no set. Open addressing; it grows to stay half empty.
class RowTable {
 public:
  void clear();

  // The value stored for a row; if there is none, stores `value` and returns it.
  int32_t find_or_insert(int32_t row, int32_t value) {
    size_t place = home(row);
    while (entries_[place].row != row) {
      if (entries_[place].row < 0) {
        entries_[place] = {row, value};
        if (++used_ > entries_.size() / 2) {
          grow();
        }
        return value;
      }
      place = (place + 1) & (entries_.size() - 1);
    }
    return entries_[place].value;
  }

 private:
  struct Entry {
    int32_t row;  // -1: free
    int32_t value;
  };

  size_t home(int32_t row) const {
    return (static_cast<uint32_t>(row) * 0x9E3779B1u) >> shift_;
  }
  void grow();

  std::vector<Entry> entries_;
  size_t used_ = 0;
  int shift_ = 0;
};

// One table's part of a call. What it changes in the directory can be undone until it is committed.
struct Assignment {
  CachedTable table;
  std::vector<Hit> hits;
  std::vector<Miss> misses;          // in the order in which the batch names them
  std::vector<LostSlot> sent_back;   // spilled rows that no batch waits for
  std::vector<MissingId> missing;
  RowTable elsewhere;                // rows in no set: a slot of the spill area, or -1 - a miss
  int64_t lookups = 0;
  int64_t conflicts = 0;
  int64_t needed_spill = 0;
  int64_t bad_slot = -1;             // a slot that holds what is no row of the table
  int64_t num_written = 0;           // set by commit()
};

// Gives each row of ids [n], which must be rows of the table, a slot; writes the slots, if the spill area is large
// enough and no slot is bad.
template <typename index_t>
using AssignSlots = void (*)(Assignment& assignment, const index_t* ids, int64_t n, index_t* locations);

void undo(const Assignment& assignment);

// Finishes the directory. `dirty`: the batch is going to update its rows.
void commit(Assignment& assignment, bool dirty);

// The rows that change place, in arrays of num_written and misses.size() elements.
void list_moves(const Assignment& assignment, int32_t* written_slots, int32_t* written_rows, int32_t* fetched_slots,
                int32_t* fetched_rows);

// The byte of a row's count after more lookups: torchrec_mpe/ops/reference/lookup_counts.py.
uint8_t count_lookups(const CachedTable& table, uint8_t byte, int32_t row, int64_t more);

TORCHREC_MPE_OF_EACH_CPU(
    template <typename index_t>
    void assign_slots(Assignment& assignment, const index_t* ids, int64_t n, index_t* locations);)

}  // namespace torchrec_mpe
