// Messages between ranks of one process: sends are eager or wait for their receive, and what has completed is told in
// a random order and after a random while.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <tuple>
#include <vector>

#include "wire.h"

class Network {
public:
    // Sends of at most `eager` bytes complete at once.
    Network(unsigned seed, std::size_t eager) : random_(seed), eager_(eager) {}

    std::unique_ptr<bitring::Wire> wire(int rank) { return std::make_unique<End>(*this, rank); }

    // Messages sent and not received, or the other way round.
    std::size_t left() const {
        std::size_t count = 0;
        for (const auto& [key, pair] : channels_) count += pair.sends.size() + pair.receives.size();
        return count;
    }

private:
    struct Started {
        char* memory;
        std::size_t nbytes;
        int message;
        std::vector<char> copy;  // an eager send's
        bool done = false;
    };

    struct Channel {
        std::deque<std::shared_ptr<Started>> sends, receives;
    };

    class End final : public bitring::Wire {
    public:
        End(Network& network, int rank) : network_(network), rank_(rank) {}

        int start(bool sends, void* memory, std::size_t nbytes, int peer, int tag, int message) override {
            const std::lock_guard<std::mutex> lock(network_.mutex_);
            auto started = std::make_shared<Started>();
            *started = {static_cast<char*>(memory), nbytes, message, {}, false};
            if (sends && nbytes <= network_.eager_) {
                started->copy.assign(started->memory, started->memory + nbytes);
                started->done = true;
            }
            mine_.push_back(started);
            Channel& channel = network_.channels_[sends ? std::make_tuple(rank_, peer, tag) : std::make_tuple(peer, rank_, tag)];
            (sends ? channel.sends : channel.receives).push_back(started);
            while (!channel.sends.empty() && !channel.receives.empty()) {
                Started &from = *channel.sends.front(), &to = *channel.receives.front();
                if (from.nbytes > to.nbytes) return 15;  // MPI_ERR_TRUNCATE
                if (from.nbytes > 0) std::memcpy(to.memory, from.copy.empty() ? from.memory : from.copy.data(), from.nbytes);
                from.done = to.done = true;
                channel.sends.pop_front();
                channel.receives.pop_front();
            }
            return 0;
        }

        int complete(int* messages, int room, int* count) override {
            const std::lock_guard<std::mutex> lock(network_.mutex_);
            *count = 0;
            std::shuffle(mine_.begin(), mine_.end(), network_.random_);
            for (std::size_t k = 0; k < mine_.size() && *count < room;) {
                if (!mine_[k]->done || network_.random_() % 3 == 0) {
                    ++k;
                    continue;
                }
                messages[(*count)++] = mine_[k]->message;
                mine_.erase(mine_.begin() + std::ptrdiff_t(k));
            }
            return 0;
        }

    private:
        Network& network_;
        int rank_;
        std::vector<std::shared_ptr<Started>> mine_;
    };

    std::mutex mutex_;
    std::mt19937 random_;
    std::size_t eager_;
    std::map<std::tuple<int, int, int>, Channel> channels_;
};
