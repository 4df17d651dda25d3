// Memory that processes map together, and whether those that made it are still there.
#include "memory.h"
#include "presence.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>

using namespace bitring;

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::_Exit(1);
}

void check(bool ok, const std::string& message) {
    if (!ok) fail(message);
}

template <class Call>
int error_of(Call call) {
    try {
        call();
    } catch (const std::system_error& error) {
        return error.code().value();
    }
    return 0;
}

int entries(const std::string& folder, const std::string& prefix) {
    int count = 0;
    DIR* directory = opendir(folder.c_str());
    check(directory != nullptr, folder);
    while (const dirent* entry = readdir(directory)) count += std::string(entry->d_name).rfind(prefix, 0) == 0;
    closedir(directory);
    return count;
}

int mappings() {
    std::FILE* file = std::fopen("/proc/self/maps", "r");
    int count = 0;
    char line[4096];
    while (std::fgets(line, sizeof line, file)) count += std::strstr(line, "memfd:bitring") != nullptr;
    std::fclose(file);
    return count;
}

// A child that has made what others may look at, and waits to be told what to become.
struct Child {
    template <class Make>
    explicit Child(Make make) {
        int told[2], to_child[2];
        check(pipe(told) == 0 && pipe(to_child) == 0, "pipe");
        pid = fork();
        check(pid >= 0, "fork");
        if (pid == 0) {
            close(told[0]);
            close(to_child[1]);
            make(told[1], to_child[0]);
            _exit(0);
        }
        close(told[1]);
        close(to_child[0]);
        from = told[0];
        to = to_child[1];
        check(read(from, &descriptor, sizeof descriptor) == sizeof descriptor, "the child's descriptor");
    }
    void tell(char what) {
        check(write(to, &what, 1) == 1, "tell");
        if (what == 'l') check(read(from, &what, 1) == 1, "the child's answer");
    }
    void end() {
        close(to);
        waitpid(pid, nullptr, 0);
        close(from);
    }
    pid_t pid;
    int from, to, descriptor = -1;
};

void presence_in_child(int out, int in) {
    Presence presence = Presence::make("");
    const int descriptor = presence.memory().descriptor();
    check(write(out, &descriptor, sizeof descriptor) == sizeof descriptor, "write");
    char what;
    while (read(in, &what, 1) == 1) {
        if (what == 'x') _exit(3);
        if (what == 'l') {
            presence.leave();
            check(write(out, &what, 1) == 1, "write");
        }
    }
}

void presences() {
    const auto is = [](const Presence& presence, Presence::Liveness liveness, const std::string& what) {
        for (int k = 0; k < 200; ++k) {
            if (presence.liveness() == liveness) return;
            usleep(10000);
        }
        fail(what + ": " + std::to_string(int(presence.liveness())));
    };
    {
        Child child(presence_in_child);
        const Presence presence = Presence::open(child.pid, child.descriptor, "");
        check(presence.liveness() == Presence::Liveness::here, "a child that runs");
        kill(child.pid, SIGSTOP);
        int status;
        waitpid(child.pid, &status, WUNTRACED);
        check(presence.liveness() == Presence::Liveness::here, "a child that is stopped");
        kill(child.pid, SIGCONT);
        child.tell('x');
        is(presence, Presence::Liveness::dead, "a child that ended without a word");
        child.end();
        is(presence, Presence::Liveness::dead, "a child that is gone altogether");
    }
    {
        Child child(presence_in_child);
        const Presence presence = Presence::open(child.pid, child.descriptor, "");
        kill(child.pid, SIGKILL);
        is(presence, Presence::Liveness::dead, "a child that was killed");
        child.end();
    }
    {
        Child child(presence_in_child);
        const Presence presence = Presence::open(child.pid, child.descriptor, "");
        child.tell('l');
        check(presence.liveness() == Presence::Liveness::left, "a child that left");
        child.end();
        check(presence.liveness() == Presence::Liveness::left, "a child that left, and ended");
    }
    {
        // A lock belongs to a process: not to a fork of it, and a second look in the same process must not drop it.
        Child child([](int out, int in) {
            Presence presence = Presence::make("");
            const int descriptor = presence.memory().descriptor();
            setpgid(0, 0);
            if (fork() == 0) {
                pause();
                _exit(0);
            }
            check(write(out, &descriptor, sizeof descriptor) == sizeof descriptor, "write");
            char what;
            while (read(in, &what, 1) == 1) {
            }
        });
        const Presence presence = Presence::open(child.pid, child.descriptor, "");
        check(presence.liveness() == Presence::Liveness::here, "a child that has forked");
        kill(child.pid, SIGKILL);
        is(presence, Presence::Liveness::dead, "a child that was killed, but not its own child");
        kill(-child.pid, SIGKILL);
        child.end();
    }
}

void memories() {
    const int before = mappings();
    {
        Memory mine = Memory::make(3 << 20, "");
        for (std::size_t i = 0; i < mine.nbytes(); i += 4096) check(mine.data()[i] == 0, "new memory is not zero");
        check(reinterpret_cast<std::uintptr_t>(mine.data()) % (2u << 20) == 0, "not aligned for huge pages");
        Memory same = Memory::open(3 << 20, getpid(), mine.descriptor(), "");
        mine.data()[12345] = 7;
        check(same.data()[12345] == 7, "not the same memory");
        check(error_of([&] { Memory::open(1 << 20, getpid(), mine.descriptor(), ""); }) == EBADF, "another size");
        check(error_of([&] { Memory::open(4096, getpid(), 12345, ""); }) == ENOENT, "no such descriptor");
        check(error_of([&] { Memory::open(4096, getpid(), 1, ""); }) != 0, "what is not a file of ours");
        Memory moved(std::move(mine));
        check(moved.data()[12345] == 7 && mine.data() == nullptr && mappings() == before + 2, "moved");
        moved.close_descriptor();
        check(moved.descriptor() == -1 && same.data()[12345] == 7, "closed");
    }
    check(mappings() == before, "a mapping is left");
    {
        Child child([](int out, int in) {
            Memory memory = Memory::make(100000, "");
            const int descriptor = memory.descriptor();
            std::strcpy(memory.data() + 99990, "hello");
            check(write(out, &descriptor, sizeof descriptor) == sizeof descriptor, "write");
            char what;
            while (read(in, &what, 1) == 1) {
            }
        });
        Memory theirs = Memory::open(100000, child.pid, child.descriptor, "");
        theirs.close_descriptor();
        child.end();
        check(std::strcmp(theirs.data() + 99990, "hello") == 0, "memory outlives its maker");
    }
    const std::string name = "bitring-test-" + std::to_string(getpid());
    {
        Memory mine = Memory::make(5000, name);
        check(entries("/dev/shm", name) == 1, "a named file");
        check(error_of([&] { Memory::make(5000, name); }) == EEXIST, "a name that is taken");
        Memory same = Memory::open(5000, 0, -1, name);
        check(error_of([&] { Memory::open(5001, 0, -1, name); }) == EBADF, "a named file of another size");
        mine.data()[4999] = 9;
        mine.unlink();
        check(entries("/dev/shm", name) == 0 && same.data()[4999] == 9, "unlinked");
    }
    { Memory forgotten = Memory::make(5000, name); }
    check(entries("/dev/shm", name) == 0, "a file is left in /dev/shm");

    check(error_of([] { Memory::make(std::size_t(1) << 45, ""); }) == ENOMEM, "more memory than there is");
    signal(SIGXFSZ, SIG_IGN);
    rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    const rlim_t old = limit.rlim_cur;
    limit.rlim_cur = 1 << 20;
    setrlimit(RLIMIT_FSIZE, &limit);
    check(error_of([] { Memory::make(2 << 20, ""); }) == EFBIG, "no more than the limit");
    check(error_of([&] { Memory::make(2 << 20, name); }) == EFBIG, "no more than the limit, named");
    limit.rlim_cur = old;
    setrlimit(RLIMIT_FSIZE, &limit);
    check(entries("/dev/shm", name) == 0 && mappings() == before, "something is left after an error");
    const Memory none = Memory::make(0, "");
    check(none.data() == nullptr && none.nbytes() == 0, "no memory at all");
}

}  // namespace

int main() {
    memories();
    presences();
    check(entries("/dev/shm", "bitring-test-") == 0, "a file is left in /dev/shm");
    return 0;
}
