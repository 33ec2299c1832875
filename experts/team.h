// Threads that share the chunks of one operation.
//
// OpenMP ends every region with a barrier: where the cores are shared with other processes, an operation takes as long
// as the thread that was interrupted. Here a helper takes chunks only while it runs: one that sleeps, or lost its core
// between two chunks, is not waited for. Idle helpers yield the core to whoever wants it, and soon sleep.

#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace evermoe {

class Team {
 public:
  // One for the process, whichever library asks; never destroyed, since helpers live as long as the process.
  __attribute__((visibility("default"))) static Team& shared() {
    static Team* team = new Team;
    return *team;
  }

  // How many threads share an operation, the caller included. Not torch's number: that is for its own operations.
  void resize(int threads) { threads_.store(threads, std::memory_order_relaxed); }

  // run(chunk) for each of `chunks`, once, by this thread and the helpers that are awake.
  template <typename Run>
  void run(int64_t chunks, const Run& run) {
    const int threads = threads_.load(std::memory_order_relaxed);
    std::unique_lock lock(busy_, std::defer_lock);
    if (chunks < 2 || threads < 2 || !lock.try_lock()) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
      return;
    }
    for (; helpers_ < threads - 1; ++helpers_) std::thread([this] { help(); }).detach();
    call_.store([](const void* job, int64_t chunk) { (*static_cast<const Run*>(job))(chunk); }, std::memory_order_relaxed);
    job_.store(&run, std::memory_order_relaxed);
    chunks_.store(chunks, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t turn = (left_.load(std::memory_order_relaxed) >> 32) + 1;
    left_.store(turn << 32 | static_cast<uint64_t>(chunks), std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) left_.notify_all();
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) rest(spins);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr auto kAwake = std::chrono::microseconds(200);

  Team() = default;

  static void rest(int spins) {
    if (spins % 64 == 63) sched_yield();
    else __builtin_ia32_pause();
  }

  // Runs one chunk of the operation under way; false where there is none left. While a turn has chunks left the other
  // fields are its own: they are rewritten only when all of its chunks are done. So an exchange that succeeds has seen
  // them as they belong together.
  bool take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    const auto count = static_cast<int64_t>(left & 0xffffffffu);
    if (count == 0) return false;
    const Call call = call_.load(std::memory_order_relaxed);
    const void* job = job_.load(std::memory_order_relaxed);
    const int64_t chunks = chunks_.load(std::memory_order_relaxed);
    if (!left_.compare_exchange_strong(left, left - 1, std::memory_order_acq_rel)) return true;
    call(job, chunks - count);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    for (;;) {
      const uint64_t seen = left_.load(std::memory_order_acquire);
      if (take()) continue;
      const auto until = std::chrono::steady_clock::now() + kAwake;
      int spins = 0;
      while (left_.load(std::memory_order_relaxed) >> 32 == seen >> 32 &&
             (spins % 64 != 0 || std::chrono::steady_clock::now() < until))
        rest(spins++);
      const uint64_t now = left_.load(std::memory_order_seq_cst);
      if (now >> 32 != seen >> 32) continue;
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      left_.wait(now, std::memory_order_seq_cst);
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  std::atomic<int> threads_{1};
  std::mutex busy_;
  int helpers_ = 0;
  alignas(64) std::atomic<uint64_t> left_{0};  // turn << 32 | chunks nobody has taken
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<int64_t> chunks_{0};
  std::atomic<const void*> job_{nullptr};
  std::atomic<Call> call_{nullptr};
  alignas(64) std::atomic<int> asleep_{0};
};

}  // namespace evermoe
