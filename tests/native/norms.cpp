// Norms and looks for NaN against sums one by one: all types, odd lengths, any place of what is not finite.
#include "norms.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

using namespace bitring;

namespace {

void fail(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::exit(1);
}

// 1.5, and infinity, of each type.
template <class Word, class Wide>
void check(Type type, Word one_and_a_half, Word infinity, Word nan) {
    for (std::size_t n = 0; n < 70; ++n) {
        std::vector<Word> values(n, one_and_a_half);
        std::vector<Wide> residual(n);
        double sums = 1;
        for (std::size_t i = 0; i < n; ++i) {
            residual[i] = Wide(i) / 4;
            sums += (1.5 + double(i) / 4) * (1.5 + double(i) / 4);
        }
        double found[2] = {1, 1};
        const auto* bytes = reinterpret_cast<const char*>(values.data());
        squares_adder(type)(bytes, reinterpret_cast<const char*>(residual.data()), n, &found[0], &found[1]);
        if (found[0] != 1 + 2.25 * double(n) || found[1] != sums) fail("squares of " + std::to_string(n));
        if (!all_finite(values.data(), type, n)) fail("finite numbers passed for others");
        for (std::size_t i = 0; i < n; ++i) {
            for (const Word word : {infinity, nan}) {
                values[i] = word;
                if (all_finite(values.data(), type, n)) fail("not seen at " + std::to_string(i));
            }
            values[i] = one_and_a_half;
        }
    }
}

template <class Float, class Word>
Word bits(Float x) {
    Word word;
    std::memcpy(&word, &x, sizeof word);
    return word;
}

}  // namespace

int main() {
    const auto f = [](float x) { return bits<float, std::uint32_t>(x); };
    const auto d = [](double x) { return bits<double, std::uint64_t>(x); };
    check<std::uint32_t, float>(Type::f32, f(1.5f), f(-INFINITY), f(NAN));
    check<std::uint64_t, double>(Type::f64, d(1.5), d(std::numeric_limits<double>::infinity()), d(NAN));
    check<std::uint16_t, float>(Type::f16, 0x3e00, 0xfc00, 0x7e00);
    check<std::uint16_t, float>(Type::bf16, 0x3fc0, 0x7f80, 0x7fc0);
    return 0;
}
