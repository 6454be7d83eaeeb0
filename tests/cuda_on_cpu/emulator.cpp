// The runtime of emulator.h. The kernels are compiled with -fsanitize=thread, whose hooks
// (__tsan_read4 and so on) are defined here, in libtsan's place. Each access must be
//   inside one tensor's storage or shared memory, and aligned to its size;
//   of what no other thread wrote, or wrote and read, without a barrier between;
//   of shared memory that was written before it is read.
// All threads must reach each barrier, the same one. New storage holds NaN, guard zones around it.
#include "emulator.h"

#include <c10/core/CPUAllocator.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

namespace emulator {

Index at;

namespace {

struct Stop {};

constexpr size_t GUARD = 256, STACK = 64 << 10, GRANULE = 2;

struct Access {
  uint32_t thread = 0, epoch = 0;  // thread over the grid, from 1; 0: none
};

struct Cell {
  Access writer, readers[2];
};

struct Region {
  uintptr_t base;
  size_t size;
  bool is_shared;
  uint64_t launch = 0;
  std::vector<Cell> cells;
};

std::recursive_mutex mutex;
std::map<uintptr_t, Region> regions;  // by base - GUARD, or by base where shared
std::string error;                    // the first
bool inside = false;                  // in a kernel's own code, not in what is called from there
uint64_t launches = 0;
uint32_t epoch, thread_id, block_first;
uintptr_t host_stack, stacks_at, image_from, constants_to;
size_t stacks_size;

void fail(const std::string& what) {
  if (error.empty()) error = what;
}

Region* find(uintptr_t a) {
  static Region* last = nullptr;
  static uint64_t last_launch = 0;
  if (last_launch == launches && last && a - last->base < last->size) return last;
  auto it = regions.upper_bound(a);
  if (it == regions.begin()) return nullptr;
  Region& r = (--it)->second;
  if (a >= r.base + r.size + GUARD) return nullptr;
  last = &r, last_launch = launches;
  return &r;
}

// Sectors of 32 bytes that warps ask for in one request: the k-th access of each lane at one place
// in the code. And those that were touched at all.
bool counting = false;
uint64_t asked;
std::map<std::tuple<uintptr_t, uint32_t, uint32_t>, std::set<uintptr_t>> requests;
std::map<std::pair<uintptr_t, uint32_t>, uint32_t> accesses;
std::set<std::pair<uintptr_t, bool>> touched;

void count(uintptr_t a, size_t n, bool write, uintptr_t pc) {
  const uint32_t thread = at.thread.x, k = accesses[{pc, thread}]++;
  auto& sectors = requests[{pc, k, thread / 32}];
  for (uintptr_t s = a / 32; s <= (a + n - 1) / 32; ++s) {
    asked += sectors.insert(s).second;
    touched.insert({s, write});
  }
}

void check(uintptr_t a, size_t n, bool write, uintptr_t pc) {
  const auto what = [&](const std::string& problem) {
    std::ostringstream s;
    s << problem << ": " << (write ? "write" : "read") << " of " << n << " bytes, addr2line 0x"
      << std::hex << pc - image_from;
    fail(s.str());
  };
  Region* r = find(a);
  if (!r) {
    if (write || a < image_from || a >= constants_to) what("outside every tensor");
    return;
  }
  if (a < r->base || a + n > r->base + r->size) return what("out of bounds");
  if (a % std::min<size_t>(n, 16)) what("misaligned");
  if (counting && !r->is_shared) count(a, n, write, pc);
  if (r->launch != launches) {
    r->launch = launches;
    r->cells.assign(r->size / GRANULE + 1, Cell());
  }
  const auto races = [&](const Access& other) {
    if (other.thread == 0 || other.thread == thread_id) return false;
    return other.thread < block_first ? !r->is_shared : other.epoch == epoch;
  };
  for (size_t i = (a - r->base) / GRANULE; i <= (a + n - 1 - r->base) / GRANULE; ++i) {
    Cell& c = r->cells[i];
    if (races(c.writer)) what("race");
    if (write && (races(c.readers[0]) || races(c.readers[1]))) what("race");
    if (!write && r->is_shared && (c.writer.thread < block_first || !c.writer.thread))
      what("uninitialised shared memory");
    if (write) {
      c.writer = {thread_id, epoch};
    } else {
      if (c.readers[0].thread != thread_id) c.readers[1] = c.readers[0];
      c.readers[0] = {thread_id, epoch};
    }
  }
}

void touch(void* p, size_t n, bool write, const void* pc) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  // The host's stack holds the kernel's parameters.
  const bool on_a_stack = a - stacks_at < stacks_size || a - host_stack < STACK;
  if (!inside || on_a_stack || a - reinterpret_cast<uintptr_t>(&at) < sizeof at) return;
  inside = false;
  check(a, n, write, reinterpret_cast<uintptr_t>(pc));
  inside = true;
}

// -- storage --------------------------------------------------------------------------------------

void release(void* raw) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto it = regions.find(reinterpret_cast<uintptr_t>(raw));
  const auto* bytes = static_cast<const unsigned char*>(raw);
  const auto is_guard = [](unsigned char byte) { return byte == 0xFF; };
  const auto* after = bytes + GUARD + it->second.size;
  if (!std::all_of(bytes, bytes + GUARD, is_guard) || !std::all_of(after, after + GUARD, is_guard))
    fail("a guard zone was written");
  regions.erase(it);
  ++launches;  // forgets the region found last
  std::free(raw);
}

struct Guarded : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    const size_t all = (n + 2 * GUARD + 63) / 64 * 64;
    char* raw = static_cast<char*>(std::aligned_alloc(64, all));
    std::memset(raw, 0xFF, all);
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const auto a = reinterpret_cast<uintptr_t>(raw);
    regions.emplace(a, Region{a + GUARD, n, false, 0, {}});
    ++launches;
    return {raw + GUARD, raw, release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Guarded guarded;

// Finds this library in memory: a kernel may read its constants.
int find_image(dl_phdr_info* info, size_t, void*) {
  uintptr_t end = 0;
  bool here = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    const uintptr_t from = info->dlpi_addr + h.p_vaddr, self = reinterpret_cast<uintptr_t>(&touch);
    if (h.p_type != PT_LOAD) continue;
    here |= self >= from && self < from + h.p_memsz;
    end = std::max(end, from + h.p_memsz);
  }
  if (here) image_from = info->dlpi_addr, constants_to = end;
  return here;
}

const bool installed = [] {
  c10::SetCPUAllocator(&guarded, 100);
  dl_iterate_phdr(find_image, nullptr);
  return true;
}();

// -- fibers ---------------------------------------------------------------------------------------

struct Fiber {
  ucontext_t context;
  unsigned thread;
  int line;
};
std::vector<Fiber> fibers;
std::vector<Fiber*> idle, waiting;
Fiber* current;
ucontext_t scheduler;
unsigned next_thread, threads_in_block, finished;
const std::function<void()>* thread_body;

void become(unsigned thread) {
  at.thread = dim3(thread);
  thread_id = block_first + thread;
}

void fiber_main() {
  for (;;) {
    while (next_thread < threads_in_block) {  // one fiber serves all threads that meet no barrier
      become(current->thread = next_thread++);
      inside = true;
      try {
        (*thread_body)();
      } catch (const Stop&) {
      }
      inside = false;
      ++finished;
    }
    idle.push_back(current);
    swapcontext(&current->context, &scheduler);
  }
}

void resume(Fiber* f) {
  current = f;
  become(f->thread);
  swapcontext(&scheduler, &f->context);
}

void make_fibers(unsigned n) {
  if (fibers.size() >= n) return;
  fibers.resize(n), idle.clear();
  if (stacks_size) munmap(reinterpret_cast<void*>(stacks_at), stacks_size);
  stacks_size = n * STACK;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stacks = mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, flags, -1, 0);
  stacks_at = reinterpret_cast<uintptr_t>(stacks);
  for (unsigned i = 0; i < n; ++i) {
    ucontext_t& context = fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = static_cast<char*>(stacks) + i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    idle.push_back(&fibers[i]);
  }
}

void run_block() {
  next_thread = finished = epoch = 0;
  while (next_thread < threads_in_block) {
    Fiber* f = idle.back();
    idle.pop_back();
    resume(f);
  }
  while (!waiting.empty()) {
    if (finished) fail("barrier divergence: some threads have ended, the others wait");
    for (const Fiber* f : waiting)
      if (f->line != waiting[0]->line) fail("barrier divergence: two barriers at once");
    ++epoch;
    std::vector<Fiber*> released;
    released.swap(waiting);
    for (Fiber* f : released) resume(f);
  }
  requests.clear(), accesses.clear();
}

}  // namespace

int64_t setting(const char* name, int64_t value) {
  const char* given = std::getenv(name);
  return given ? std::atoll(given) : value;
}

void fail_assertion(const char* what) {
  inside = false;
  fail(what);
  throw Stop();
}

void barrier(int line) {
  inside = false;
  Fiber* self = current;
  self->line = line;
  waiting.push_back(self);
  swapcontext(&self->context, &scheduler);
  inside = true;
}

void shared(const void* data, size_t size) {
  inside = false;
  const auto a = reinterpret_cast<uintptr_t>(data);
  regions.emplace(a, Region{a, size, true, 0, {}});
  inside = true;
}

void run(dim3 grid, dim3 threads, const std::function<void()>& thread) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (grid.x < 1 || grid.y < 1 || grid.z != 1 || grid.y > 65535 || grid.x > 2147483647u ||
      threads.x < 1 || threads.x > 1024 || threads.y * threads.z != 1)
    fail("a launch that CUDA refuses");
  ++launches;
  make_fibers(threads.x);
  at.grid = grid, at.threads = threads;
  threads_in_block = threads.x, thread_body = &thread;
  host_stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  block_first = 1;
  for (unsigned b = 0; b < grid.x * grid.y; ++b, block_first += threads.x) {
    at.block = dim3(b % grid.x, b / grid.x);
    run_block();
  }
  const std::string all = std::exchange(error, "");
  TORCH_CHECK(all.empty(), "emulated CUDA: ", all);
}

}  // namespace emulator

extern "C" {

#define EXPORTED __attribute__((visibility("default")))
// Sectors asked for and touched since the last call.
EXPORTED void count_sectors(uint64_t* to) {
  using namespace emulator;
  to[0] = asked, to[1] = touched.size();
  counting = true, asked = 0, touched.clear();
}

#define TOUCH(name, n, write) \
  void __tsan_##name(void* p) { emulator::touch(p, n, write, __builtin_return_address(0)); }
#define HOOKS(n)                   \
  TOUCH(read##n, n, false)         \
  TOUCH(write##n, n, true)         \
  TOUCH(unaligned_read##n, n, false) \
  TOUCH(unaligned_write##n, n, true)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  emulator::touch(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  emulator::touch(p, n, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Host code's atomics (reference counts), which the compiler turns into calls too.
#define EXCHANGE(bits, T, strength)                                                      \
  bool __tsan_atomic##bits##_compare_exchange_##strength(                                \
      volatile T* p, T* e, T v, int, int) {                                              \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                            \
  }
#define ATOMIC(bits, T, name) \
  T __tsan_atomic##bits##_##name(volatile T* p, T v, int) { return __atomic_##name(p, v, 5); }
#define ATOMICS(bits, T)                                                                 \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); } \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); } \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                            \
    return __atomic_exchange_n(p, v, 5);                                                 \
  }                                                                                      \
  ATOMIC(bits, T, fetch_add) ATOMIC(bits, T, fetch_sub)                                  \
  ATOMIC(bits, T, fetch_and) ATOMIC(bits, T, fetch_or)                                   \
  EXCHANGE(bits, T, strong) EXCHANGE(bits, T, weak)
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(5); }
void __tsan_atomic_signal_fence(int) {}
}
