// Whether there is unread news, as whoever sends much or often asks; and deaths that a thread has not heeded.
#include "news.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

using namespace bitring;

namespace {

void check(bool ok, const char* message) {
    if (ok) return;
    std::fprintf(stderr, "%s\n", message);
    std::_Exit(1);
}

}  // namespace

int main() {
    News& news = News::of_process();
    check(!news.unread() && !news.unread_lately(), "news, and nowhere for them to come to");
    int ends[2];
    check(pipe(ends) == 0, "no pipe");
    const int epoll = epoll_create1(0);
    epoll_event event{};
    event.events = EPOLLIN;
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event) == 0, "no epoll");
    news.comes_to(epoll);
    check(!news.unread(), "nothing has come");
    check(write(ends[1], "x", 1) == 1, "nothing written");
    check(news.unread(), "what has come is not seen");
    check(news.unread_lately(), "what was seen is forgotten before it is read");
    char read_now;
    check(read(ends[0], &read_now, 1) == 1, "nothing to read");
    check(!news.unread_lately() && !news.unread(), "what was read is still there");
    check(write(ends[1], "x", 1) == 1, "nothing written");
    usleep(100);
    check(news.unread_lately(), "what came some while ago is not seen");
    news.comes_to(-1);
    check(!news.unread() && !news.unread_lately(), "news from where nobody looks any more");
    news.tell_death();
    check(news.unread() && news.unread_lately(), "a death that this thread has not heeded is no news");
    std::thread([&] {
        news.heed_deaths();
        check(!news.unread(), "a death that was heeded is news");
    }).join();
    check(news.unread() && news.unread_lately(), "another thread has heeded it for this one");
    news.heed_deaths();
    check(!news.unread() && !news.unread_lately(), "a death that was heeded is still news");
    std::puts("ok");
}
