#include "cache_slots.h"

namespace torchrec_mpe {
namespace {

constexpr uint32_t kStreamCounts = 2;
constexpr int64_t kLargestCount = int64_t{31} << 14;
enum CacheCounter { kCalls, kRequested, kUnique, kUniqueMisses, kConflictUniqueMisses, kEvictions };

// The first word of Philox-4x32-10.
uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

void put_back(const CachedTable& table, const LostSlot& lost) {
  table.slot_rows[lost.slot] = lost.row;
  table.slot_batches[lost.slot] = lost.batch;
  table.slot_dirty[lost.slot] = lost.dirty;
  if (table.is_lfu()) {
    table.slot_counts[lost.slot] = lost.count;
  }
}

}  // namespace

void RowTable::clear() {
  constexpr int kLog = 10;
  entries_.assign(size_t{1} << kLog, {-1, 0});
  shift_ = 32 - kLog;
  used_ = 0;
}

void RowTable::grow() {
  std::vector<Entry> old(4 * entries_.size(), {-1, 0});
  old.swap(entries_);
  shift_ -= 2;
  for (const Entry& entry : old) {
    if (entry.row >= 0) {
      size_t place = home(entry.row);
      while (entries_[place].row >= 0) {
        place = (place + 1) & (entries_.size() - 1);
      }
      entries_[place] = entry;
    }
  }
}

uint8_t count_lookups(const CachedTable& table, uint8_t byte, int32_t row, int64_t more) {
  int64_t count = (byte < 16 ? byte : int64_t{16 + (byte & 15)} << ((byte >> 4) - 1)) + more;
  count = count < kLargestCount ? count : kLargestCount;
  if (count < 32) {
    return static_cast<uint8_t>(count);
  }
  const int exponent = 63 - __builtin_clzll(static_cast<uint64_t>(count)) - 4;
  const int64_t rest = count & ((int64_t{1} << exponent) - 1);
  int64_t mantissa = count >> exponent;
  if (rest > 0) {
    const int64_t number = row + table.first_row;
    const uint32_t noise = philox(static_cast<uint32_t>(number), static_cast<uint32_t>(table.batch), 0,
                                  static_cast<uint32_t>(kStreamCounts + 256 * (number >> 32)), table.seed);
    mantissa += (noise & ((int64_t{1} << exponent) - 1)) < rest;
  }
  // A mantissa of 32 is 16 of the next exponent, whose byte is the next.
  const int64_t encoded = ((exponent + 1) << 4) + (mantissa - 16);
  return static_cast<uint8_t>(encoded < 255 ? encoded : 255);
}

void undo(const Assignment& assignment) {
  const CachedTable& table = assignment.table;
  for (const Miss& miss : assignment.misses) {
    if (miss.before.slot >= 0) {
      put_back(table, miss.before);
    }
  }
  for (const LostSlot& lost : assignment.sent_back) {
    put_back(table, lost);
  }
  for (const Hit& hit : assignment.hits) {
    table.slot_batches[hit.slot] = hit.batch;
  }
}

void commit(Assignment& assignment, bool dirty) {
  const CachedTable& table = assignment.table;
  for (const Hit& hit : assignment.hits) {
    if (table.is_lfu()) {
      uint8_t& count = table.slot_counts[hit.slot];
      count = count_lookups(table, count, table.slot_rows[hit.slot], hit.lookups);
    }
    if (dirty) {
      table.slot_dirty[hit.slot] = 1;
    }
  }
  int64_t evictions = 0, written = 0;
  for (const LostSlot& lost : assignment.sent_back) {
    written += lost.dirty != 0;
    if (table.is_lfu()) {
      table.row_counts[lost.row] = lost.count;
    }
  }
  for (const Miss& miss : assignment.misses) {
    if (miss.before.row >= 0) {
      ++evictions;
      written += miss.before.dirty != 0;
      if (table.is_lfu()) {
        table.row_counts[miss.before.row] = miss.before.count;
      }
    }
    if (dirty) {
      table.slot_dirty[miss.before.slot] = 1;
    }
  }
  assignment.num_written = written;
  const int64_t misses = static_cast<int64_t>(assignment.misses.size());
  table.statistics[kCalls] += 1;
  table.statistics[kRequested] += assignment.lookups;
  table.statistics[kUnique] += static_cast<int64_t>(assignment.hits.size()) + misses;
  table.statistics[kUniqueMisses] += misses;
  table.statistics[kConflictUniqueMisses] += assignment.conflicts;
  table.statistics[kEvictions] += evictions;
}

void list_moves(const Assignment& assignment, int32_t* written_slots, int32_t* written_rows, int32_t* fetched_slots,
                int32_t* fetched_rows) {
  const auto write = [&](const LostSlot& lost) {
    if (lost.row >= 0 && lost.dirty != 0) {
      *written_slots++ = lost.slot;
      *written_rows++ = lost.row;
    }
  };
  for (const LostSlot& lost : assignment.sent_back) {
    write(lost);
  }
  for (const Miss& miss : assignment.misses) {
    write(miss.before);
    *fetched_slots++ = miss.before.slot;
    *fetched_rows++ = miss.row;
  }
}

}  // namespace torchrec_mpe
