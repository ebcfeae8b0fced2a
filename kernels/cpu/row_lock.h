// Keeps lookups and writes of packed rows apart: a lookup sees a row as it was before a write or after it.
//
// Rows are locked by the storage that holds them. Reads share the lock; a write waits for the reads that have begun and
// goes before those that have not, so that no stream of lookups keeps it waiting.
#pragma once

#include <cstdint>

namespace torchrec_mpe {

// Around reads of rows. A thread holds one at a time: a second one would wait for a write that waits for the first.
class SharedRowLock {
 public:
  // storage is the address of the storage that holds the rows, which all who lock them must give alike.
  explicit SharedRowLock(const void* storage);
  ~SharedRowLock();
  SharedRowLock(const SharedRowLock&) = delete;
  SharedRowLock& operator=(const SharedRowLock&) = delete;

 private:
  void* lock_;
};

// n rows of equal size and the bytes of weights where they start.
struct RowsToWrite {
  const int64_t* starts;  // [n]
  const uint8_t* rows;    // [n, row_bytes]
  int64_t n;
  int64_t row_bytes;
};

// Copies rows to weights, which lie in storage; of rows with the same start the last one stays. About a thousand rows
// are written under one hold of the lock, so that lookups wait for microseconds. Writers of one storage take turns.
void write_rows(const void* storage, uint8_t* weights, const RowsToWrite& rows);

}  // namespace torchrec_mpe
