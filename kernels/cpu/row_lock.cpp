#include "row_lock.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

namespace torchrec_mpe {
namespace {

constexpr int kStripes = 16;
constexpr int kSlots = 16;
constexpr int64_t kRowsAHold = 1024;

// Readers of one lock would fight for its cache line: each thread reads under one of several, and a writer takes all.
struct alignas(64) Slot {
  pthread_rwlock_t lock;
};

// The locks of the storages whose addresses fall to it.
struct Stripe {
  std::mutex writers;  // one at a time: readers get their turn between two holds of a writer, not of two
  Slot slots[kSlots];

  Stripe() {
    initialize();
  }

  void initialize() {
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
#ifdef __GLIBC__
    // The default lets readers in while a writer waits.
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    for (Slot& slot : slots) {
      pthread_rwlock_init(&slot.lock, &attributes);
    }
    pthread_rwlockattr_destroy(&attributes);
  }

  void lock_slots() {
    for (Slot& slot : slots) {
      pthread_rwlock_wrlock(&slot.lock);
    }
  }

  void unlock_slots() {
    for (Slot& slot : slots) {
      pthread_rwlock_unlock(&slot.lock);
    }
  }
};

Stripe* new_stripes();

// Never destroyed: threads may still look up while the process ends.
Stripe* stripes() {
  static Stripe* const all = new_stripes();
  return all;
}

// A process that forks while a thread reads or writes: the child must find whole rows and free locks.
Stripe* new_stripes() {
  Stripe* const all = new Stripe[kStripes];
  pthread_atfork(
      [] {
        for (int k = 0; k < kStripes; ++k) {
          stripes()[k].writers.lock();
          stripes()[k].lock_slots();
        }
      },
      [] {
        for (int k = 0; k < kStripes; ++k) {
          stripes()[k].unlock_slots();
          stripes()[k].writers.unlock();
        }
      },
      [] {
        // Its one thread has another id than the one that locked.
        for (int k = 0; k < kStripes; ++k) {
          stripes()[k].initialize();
          new (&stripes()[k].writers) std::mutex;
        }
      });
  return all;
}

Stripe& stripe_of(const void* storage) {
  const uint64_t mixed = reinterpret_cast<uintptr_t>(storage) * uint64_t{0x9e3779b97f4a7c15};
  return stripes()[mixed >> 32 & (kStripes - 1)];
}

int slot_of_this_thread() {
  static std::atomic<unsigned> threads{0};
  thread_local const int slot = static_cast<int>(threads.fetch_add(1, std::memory_order_relaxed) % kSlots);
  return slot;
}

}  // namespace

SharedRowLock::SharedRowLock(const void* storage) : lock_(&stripe_of(storage).slots[slot_of_this_thread()].lock) {
  // It fails, for now, only if more readers hold the lock than it can count.
  while (pthread_rwlock_rdlock(static_cast<pthread_rwlock_t*>(lock_)) != 0) {
  }
}

SharedRowLock::~SharedRowLock() {
  pthread_rwlock_unlock(static_cast<pthread_rwlock_t*>(lock_));
}

void write_rows(const void* storage, uint8_t* weights, const RowsToWrite& rows) {
  Stripe& stripe = stripe_of(storage);
  const std::lock_guard<std::mutex> turn(stripe.writers);
  for (int64_t first = 0; first < rows.n; first += kRowsAHold) {
    const int64_t last = std::min(first + kRowsAHold, rows.n);
    stripe.lock_slots();
    for (int64_t i = first; i < last; ++i) {
      std::memcpy(weights + rows.starts[i], rows.rows + i * rows.row_bytes, rows.row_bytes);
    }
    stripe.unlock_slots();
  }
}

}  // namespace torchrec_mpe
