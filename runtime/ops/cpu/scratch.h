// Memory of one thread, kept between calls because fresh pages cost more than a small decode step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace optc {

constexpr size_t kCacheLine = 64;

class Scratch {
 public:
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kCacheLine))));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kCacheLine)); }
  };
  std::unique_ptr<char, Delete> memory_;
  size_t size_ = 0;
};

// An array of this thread for one use: the next call for the same type and use may give the same memory. Vectors may read a
// little past its end.
template <typename T, int kUse>
inline T* scratch(size_t count) {
  static thread_local Scratch memory;
  return reinterpret_cast<T*>(memory.reserve(count * sizeof(T) + kCacheLine));
}

// Cuts memory into aligned arrays. Over no memory it only counts.
class Carver {
 public:
  explicit Carver(char* memory = nullptr) : memory_(memory) {}

  template <typename E>
  E* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(E) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return memory_ ? reinterpret_cast<E*>(memory_ + at) : nullptr;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace optc
