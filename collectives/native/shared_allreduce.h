// AllReduce among the ranks of a node, through the memory they share. Sums are made in rank order.
//
// Three ways, by where the values are and how many they are:
//   small     every rank leaves its values in its slot and reduces everybody's: one exchange, (p−1)n bytes read a rank;
//   resident  the buffers themselves are shared: rank r reduces chunk r of all of them, in place, and writes the result
//             to all of them: two exchanges, and with 2 ranks 16 bytes moved a float32 value, by each rank for half;
//   staged    private buffers pass through stages that stay in the cache: each rank copies the others' chunks out, reduces its
//             own, and copies the others' results in; rounds overlap.
#pragma once

#include <memory>
#include <vector>

#include "direct_collective.h"
#include "kernels.h"
#include "node.h"
#include "region.h"

namespace bitring {

// Values to reduce from `from` into `to`, which may be the same memory.
struct Operand {
    const void* from;
    void* to;
    std::size_t n;
    std::size_t itemsize;
    Reduce reduce;
};

class SharedAllreduce final : public DirectCollective {
public:
    // Several operands travel together, and must be small. `region` may be null; otherwise the one operand is in place in
    // it and is reduced there when all ranks say the same `where`.
    SharedAllreduce(std::shared_ptr<Node> node, const Intent& intent, std::vector<Operand> operands,
                    std::shared_ptr<const Region> region);

    void rebind(const Intent& intent, const Carried& carried, const Region* region) override;

    int awaited() const override { return node_->name(awaited_); }
    const Verdict& verdict() const override { return verdict_; }

    // What ranks say of the next runs.
    void sign(std::uint64_t signature) { intent_.signature = signature; }

    // The most bytes that take the small way among `size` ranks.
    static std::size_t small(int size);

protected:
    void start() override;
    Status step() override;

private:
    enum class Phase : std::uint8_t { arriving, resident, leaving, staged };

    Status arrived();
    Status reduce_resident();
    Status pass_stages();
    void reduce_small();
    void copy_out(std::size_t round);
    void reduce_stage(std::size_t round);
    void copy_in(std::size_t round);
    // Values of rank r's chunk in a round of the staged way: from first to last.
    void chunk(std::size_t round, int r, std::size_t* first, std::size_t* last) const;

    std::shared_ptr<Node> node_;
    Intent intent_;
    std::vector<Operand> operands_;
    std::shared_ptr<const Region> keep_;
    const Region* region_;
    std::size_t nbytes_ = 0;
    Verdict verdict_;
    Phase phase_ = Phase::arriving;
    int awaited_ = -1;
    std::vector<const void*> in_;
    std::vector<void*> out_;
    std::size_t at_ = 0, end_ = 0;                         // resident: the values of this rank's chunk still to do
    bool backwards_ = true;  // every other run, from the end that was touched last and may still be in the cache
    std::size_t rounds_ = 0, out_done_ = 0, reduced_ = 0, in_done_ = 0;  // staged
};

}  // namespace bitring
