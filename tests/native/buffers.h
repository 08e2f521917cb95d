// Buffers that end, or begin, exactly at an unreadable page, so one element too far is a fault and
// not a guess.
//
// An Arena owns the buffers of one case. seal() makes the inputs read-only and remembers the
// outputs; what lies between a buffer and the far page is a canary. Mapped pages are kept for the
// next case.
#ifndef HFF_TESTS_BUFFERS_H
#define HFF_TESTS_BUFFERS_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "number.h"
#include "random.h"

namespace hff_test {

constexpr int kCanary = 0xA5;

// Usable pages between two PROT_NONE pages.
class PagePool {
 public:
  static char* acquire(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::vector<char*>& kept = free_list()[bytes];
      if (!kept.empty()) {
        char* data = kept.back();
        kept.pop_back();
        return data;
      }
    }
    const int64_t page = page_bytes();
    void* mapped = mmap(nullptr, static_cast<size_t>(bytes + 2 * page), PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) fail("mmap");
    char* data = static_cast<char*>(mapped) + page;
    writable(data, bytes);
    return data;
  }

  static void release(char* data, int64_t bytes) {
    if (bytes > (1 << 20)) {
      munmap(data - page_bytes(), static_cast<size_t>(bytes + 2 * page_bytes()));
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex());
    free_list()[bytes].push_back(data);
  }

  static void writable(char* data, int64_t bytes) {
    if (mprotect(data, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE)) fail("mprotect");
  }
  static void read_only(char* data, int64_t bytes) {
    if (mprotect(data, static_cast<size_t>(bytes), PROT_READ)) fail("mprotect");
  }

  // Whole pages, a power of two of them below 1 MiB so that they are used again.
  static int64_t rounded(int64_t bytes) {
    const int64_t page = page_bytes();
    int64_t size = page;
    while (size < bytes && size < (1 << 20)) size *= 2;
    return size >= bytes ? size : (bytes + page - 1) / page * page;
  }

 private:
  static int64_t page_bytes() {
    static const int64_t bytes = sysconf(_SC_PAGESIZE);
    return bytes;
  }
  [[noreturn]] static void fail(const char* what) {
    std::perror(what);
    std::abort();
  }
  static std::mutex& mutex() {
    static std::mutex instance;
    return instance;
  }
  static std::map<int64_t, std::vector<char*>>& free_list() {
    static auto* instance = new std::map<int64_t, std::vector<char*>>;
    return *instance;
  }
};

struct Buffer {
  char* pages = nullptr;
  int64_t page_bytes = 0;
  char* data = nullptr;
  int64_t bytes = 0;
  bool output = false;
  std::vector<char> initial;  // outputs, at seal()

  bool canaries_intact() const {
    const auto clean = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kCanary; });
    };
    return clean(pages, data) && clean(data + bytes, pages + page_bytes);
  }
};

class Arena {
 public:
  explicit Arena(Random* random) : random_(random) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (sealed_) unseal();
    for (Buffer& buffer : buffers_) PagePool::release(buffer.pages, buffer.page_bytes);
  }

  Array input(int32_t dtype, int64_t count) { return add(dtype, count, false); }
  // `bytes` bytes at a line of the cache, an input; `out`: an output.
  Array panels(int64_t bytes, bool out = false) { return add(kBool, bytes, out, 64); }
  // Filled with NaN (or, for integers, the canary).
  Array output(int32_t dtype, int64_t count) {
    Array array = add(dtype, count, true);
    if (dtype < kInt64) {
      for (int64_t i = 0; i < count; ++i) array.set(i, std::nan(""));
    }
    return array;
  }

  void seal() {
    sealed_ = true;
    for (Buffer& buffer : buffers_) {
      if (buffer.output) {
        buffer.initial.assign(buffer.data, buffer.data + buffer.bytes);
      } else {
        PagePool::read_only(buffer.pages, buffer.page_bytes);
      }
    }
  }
  void unseal() {
    sealed_ = false;
    for (Buffer& buffer : buffers_) {
      if (!buffer.output) PagePool::writable(buffer.pages, buffer.page_bytes);
    }
  }

  // Outputs as they were at seal().
  void restore() {
    for (Buffer& buffer : buffers_) {
      if (buffer.output) std::copy(buffer.initial.begin(), buffer.initial.end(), buffer.data);
    }
  }
  bool outputs_as_sealed() const {
    for (const Buffer& buffer : buffers_) {
      if (!buffer.output) continue;
      if (std::memcmp(buffer.initial.data(), buffer.data, buffer.initial.size())) return false;
    }
    return canaries_intact();
  }
  // Inputs cannot change (read-only), so only outputs have canaries worth a look.
  bool canaries_intact() const {
    return std::all_of(buffers_.begin(), buffers_.end(),
                       [](const Buffer& b) { return !b.output || b.canaries_intact(); });
  }

  // Bytes of all outputs, one after the other.
  std::vector<char> outputs() const {
    std::vector<char> all;
    for (const Buffer& buffer : buffers_) {
      if (buffer.output) all.insert(all.end(), buffer.data, buffer.data + buffer.bytes);
    }
    return all;
  }

  std::vector<Buffer>& buffers() { return buffers_; }

 private:
  Array add(int32_t dtype, int64_t count, bool output, int64_t alignment = 1) {
    Buffer buffer;
    buffer.bytes = count * element_size(dtype);
    buffer.output = output;
    buffer.page_bytes = PagePool::rounded(buffer.bytes);
    buffer.pages = PagePool::acquire(buffer.page_bytes);
    const bool at_end = random_->chance(0.5);
    const int64_t end = (buffer.page_bytes - buffer.bytes) / alignment * alignment;
    buffer.data = buffer.pages + (at_end ? end : 0);
    std::memset(buffer.pages, kCanary, static_cast<size_t>(buffer.page_bytes));
    buffers_.push_back(buffer);
    Array array;
    array.dtype = dtype;
    array.data = buffer.data;
    array.count = count;
    return array;
  }

  Random* random_;
  std::vector<Buffer> buffers_;
  bool sealed_ = false;
};

}  // namespace hff_test
#endif
