// Helper threads of this process, for work that a waiting caller would do alone while cores are free.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace bitring {

class ThreadPool {
public:
    // The process's pool. It is never destroyed: its threads sleep until the process ends.
    static ThreadPool& of_process();

    // From now on at most so many threads, the caller's included, whatever was said before; the first limit is the only
    // one that can raise the number above one.
    void limit(int threads);

    int limit() const { return std::max(1, limit_.load(std::memory_order_relaxed)); }

    // How many may work for the calling thread now: one, unless it is inside a Waiting.
    int threads() const;

    // A thread inside one has nothing else to do than to wait, so that the cores it was given are free.
    class Waiting {
    public:
        explicit Waiting(bool waits) : before_(waiting()) { waiting() = waits; }
        ~Waiting() { waiting() = before_; }
        Waiting(const Waiting&) = delete;
        Waiting& operator=(const Waiting&) = delete;

    private:
        bool before_;
    };

    // Call task(context, i) for every i below `count`, in any order, on any of the threads. Returns when all are over.
    void run(std::size_t count, void (*task)(void* context, std::size_t i), void* context);

private:
    static bool& waiting() {
        thread_local bool value = false;
        return value;
    }

    void help(int number);
    void start(int helpers);

    static constexpr int kMost = 16;  // by then the memory is as busy as it can be

    std::atomic<int> limit_{0};  // 0: nobody has said
    std::mutex turn_;            // held by whoever the pool works for
    int helpers_ = 0;

    // Helpers below `wanted_` take part in a job, between ++busy_ and --busy_; it opens and closes under the lock.
    std::mutex lock_;
    std::condition_variable begun_, left_;
    std::atomic<std::uint64_t> job_{0};  // the number of the last one
    int wanted_ = 0;
    bool open_ = false;
    int busy_ = 0;
    void (*task_)(void*, std::size_t) = nullptr;
    void* context_ = nullptr;
    std::size_t count_ = 0;
    std::atomic<std::size_t> next_{0};
};

}  // namespace bitring
