// Memory that ends where its page ends: a byte read or written beyond it is a fault of the machine, whatever
// instruction does it (AddressSanitizer does not check masked vector loads and stores), and a byte before it is
// AddressSanitizer's to see.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace torchrec_mpe {

template <class T>
class FencedBuffer {
 public:
  explicit FencedBuffer(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    void* pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    pages_ = static_cast<uint8_t*>(pages);
    mprotect(pages_, page, PROT_NONE);
    mprotect(pages_ + mapped_ - page, page, PROT_NONE);
    first_ = pages_ + mapped_ - page - bytes;
    ASAN_POISON_MEMORY_REGION(pages_, first_ - pages_);
  }

  explicit FencedBuffer(const std::vector<T>& values) : FencedBuffer(values.size()) {
    if (!values.empty()) {
      std::memcpy(first_, values.data(), values.size() * sizeof(T));
    }
  }

  FencedBuffer(const FencedBuffer&) = delete;
  FencedBuffer& operator=(const FencedBuffer&) = delete;

  ~FencedBuffer() {
    ASAN_UNPOISON_MEMORY_REGION(pages_, mapped_);
    munmap(pages_, mapped_);
  }

  T* data() const {
    return reinterpret_cast<T*>(first_);
  }

  size_t size() const {
    return count_;
  }

 private:
  size_t count_;
  size_t mapped_;
  uint8_t* pages_;
  uint8_t* first_;
};

}  // namespace torchrec_mpe
