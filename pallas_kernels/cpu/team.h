// Threads that share one loop at a time with whoever calls. A caller never waits for a thread that
// has not begun, so it is safe to be called from any pool, and on cores that others use too.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

class Team {
 public:
  explicit Team(int helpers) : helpers_(helpers) {
    for (int i = 0; i < helpers; ++i) std::thread([this] { serve(); }).detach();
  }

  // body(0) ... body(count - 1), each once, in any order; returns when all are done.
  void each(int64_t count, const std::function<void(int64_t)>& body) {
    if (count <= 1 || helpers_ == 0) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    auto job = std::make_shared<Job>();
    job->count = count;
    job->body = &body;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      number_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
    work(*job);
    while (job->done.load(std::memory_order_acquire) < count) __builtin_ia32_pause();
  }

 private:
  struct Job {
    int64_t count = 0;
    const std::function<void(int64_t)>* body = nullptr;  // alive until all is done
    std::atomic<int64_t> next{0}, done{0};
  };

  static void work(Job& job) {
    for (;;) {
      const int64_t i = job.next.fetch_add(1);
      if (i >= job.count) return;
      (*job.body)(i);
      job.done.fetch_add(1, std::memory_order_release);
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      std::shared_ptr<Job> job = following(seen);
      work(*job);
    }
  }

  // The job after `seen`. Within a step the next one is near, and to be woken takes longer than to
  // wait for it; between steps the core is others'.
  std::shared_ptr<Job> following(uint64_t& seen) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    while (number_.load(std::memory_order_acquire) == seen &&
           std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 16; ++i) __builtin_ia32_pause();
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return number_.load() != seen; });
    asleep_.fetch_sub(1);
    seen = number_.load();
    return job_;
  }

  static constexpr std::chrono::microseconds kPatience{50};

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int> asleep_{0};
  const int helpers_;
};

inline Team& team() {
  // Never destroyed: its threads outlive whoever unloads things at the end.
  static Team* made = new Team(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())) - 1);
  return *made;
}
