// Every task of a job is done once, by the caller alone unless it waits, and by all who were let in where it does.
#include "thread_pool.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>
#include <vector>

using namespace bitring;

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

struct Job {
    std::vector<std::atomic<int>> done;
    std::atomic<int> elsewhere{0};
    std::thread::id caller = std::this_thread::get_id();
    bool meets = false;  // the first two tasks wait for each other

    std::vector<std::thread::id> who;

    explicit Job(std::size_t count) : done(count), who(count) {}

    static void task(void* self, std::size_t i) {
        auto* job = static_cast<Job*>(self);
        job->who[i] = std::this_thread::get_id();
        job->done[i].fetch_add(1);
        if (std::this_thread::get_id() != job->caller) job->elsewhere.fetch_add(1);
        while (job->meets && i < 2 && job->done[1 - i].load() == 0) std::this_thread::yield();
    }

    int helpers() {
        std::set<std::thread::id> all(who.begin(), who.end());
        all.erase(caller);
        return int(all.size());
    }

    void run(const std::string& what) {
        ThreadPool::of_process().run(done.size(), &Job::task, this);
        for (const auto& times : done) {
            if (times.load() != 1) fail(what + ": a task was done " + std::to_string(times.load()) + " times");
        }
    }
};

}  // namespace

int main() {
    ThreadPool& pool = ThreadPool::of_process();
    {
        const ThreadPool::Waiting waiting(true);
        if (pool.threads() != 1) fail("without a limit there are helpers");
    }
    pool.limit(3);
    pool.limit(8);
    if (pool.threads() != 1) fail("there are helpers for one who does not wait");
    Job alone(5);
    alone.run("alone");
    if (alone.elsewhere != 0) fail("one who does not wait was helped");
    {
        const ThreadPool::Waiting waiting(true);
        if (pool.threads() != 3) fail("a limit was raised");
        Job together(2);
        together.meets = true;
        together.run("together");
        if (together.elsewhere < 1) fail("nobody helped");
        {
            const ThreadPool::Waiting not_waiting(false);
            if (pool.threads() != 1) fail("there are helpers inside");
        }
        for (std::size_t count = 0; count < 2000; ++count) Job(count % 7).run("many jobs");
    }
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([] {
            const ThreadPool::Waiting waiting(true);
            for (std::size_t count = 0; count < 1000; ++count) Job(count % 5).run("several callers");
        });
    }
    for (std::thread& caller : callers) caller.join();
    const ThreadPool::Waiting waiting(true);
    pool.limit(2);
    for (int i = 0; i < 200; ++i) {
        Job fewer(50);
        fewer.run("fewer");
        if (fewer.helpers() > 1) fail("more than the limit took part");
    }
    pool.limit(1);
    Job last(4);
    last.run("after the limit");
    if (last.elsewhere != 0) fail("helped beyond the limit");
}
