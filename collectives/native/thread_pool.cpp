#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <exception>
#include <thread>

#include "wait.h"

namespace bitring {

namespace {

// So long a helper looks for the next job before it sleeps: the batches of an exchange follow each other closely.
constexpr std::uint64_t kSpinNanoseconds = 50000;

}  // namespace

ThreadPool& ThreadPool::of_process() {
    static ThreadPool* pool = new ThreadPool;
    return *pool;
}

void ThreadPool::limit(int threads) {
    threads = std::max(1, std::min(threads, kMost));
    int before = limit_.load();
    while ((before == 0 || threads < before) && !limit_.compare_exchange_weak(before, threads)) {
    }
}

int ThreadPool::threads() const { return waiting() ? limit() : 1; }

void ThreadPool::start(int helpers) {
    if (helpers_ >= helpers) return;
    // Signals are the interpreter's, whose thread has to wake up for them; but a fault is its thread's.
    sigset_t signals, before;
    sigfillset(&signals);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&signals, fault);
    pthread_sigmask(SIG_SETMASK, &signals, &before);
    try {
        for (; helpers_ < helpers; ++helpers_) std::thread(&ThreadPool::help, this, helpers_).detach();
    } catch (const std::exception&) {
        limit(helpers_ + 1);  // the system has no more
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::run(std::size_t count, void (*task)(void* context, std::size_t i), void* context) {
    const int helpers = std::min(threads() - 1, int(std::min<std::size_t>(count, kMost)) - 1);
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (helpers < 1 || !turn.try_lock()) {
        for (std::size_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    start(helpers);
    {
        const std::lock_guard<std::mutex> locked(lock_);
        task_ = task, context_ = context, count_ = count;
        next_.store(0, std::memory_order_relaxed);
        open_ = true;
        wanted_ = helpers;
        job_.fetch_add(1, std::memory_order_release);
    }
    begun_.notify_all();
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    // All are taken. Helpers that come now find nothing, and those that are at it are waited for.
    std::unique_lock<std::mutex> locked(lock_);
    open_ = false;
    left_.wait(locked, [&] { return busy_ == 0; });
}

void ThreadPool::help(int number) {
    pthread_setname_np(pthread_self(), "bitring-helper");
    std::uint64_t seen = 0;
    while (true) {
        const std::uint64_t began = now_nanoseconds();
        while (job_.load(std::memory_order_acquire) == seen && now_nanoseconds() - began < kSpinNanoseconds) {
            pause_processor();
        }
        std::unique_lock<std::mutex> locked(lock_);
        begun_.wait(locked, [&] { return job_.load(std::memory_order_relaxed) != seen && number < wanted_; });
        seen = job_.load(std::memory_order_relaxed);
        if (!open_) continue;
        ++busy_;
        const auto task = task_;
        const auto context = context_;
        const std::size_t count = count_;
        locked.unlock();
        for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
        locked.lock();
        if (--busy_ == 0) left_.notify_one();
    }
}

}  // namespace bitring
