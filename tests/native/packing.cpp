// Packing for every instruction set: the products are the formula's, and one NaN or Inf anywhere is seen.
#include "pack_kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace bitring;

namespace {

void check(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

template <class T>
void packs(Type type) {
    using Limits = std::numeric_limits<T>;
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        const Pack pack = pack_kernel(type, set);
        if (pack == nullptr) continue;
        const std::string where = std::string(set) + ": ";
        for (const std::size_t n : {0, 1, 7, 64, 131}) {
            std::vector<T> from(n), to(n + 1, T(5));
            for (T& x : from) x = T(normal(random));
            if (n > 4) from[0] = Limits::max(), from[1] = -Limits::max(), from[2] = Limits::denorm_min(), from[3] = T(-0.0);
            check(pack(n, to.data(), from.data(), 1 / 3.0), where + "finite values are none");
            for (std::size_t i = 0; i < n; ++i) {
                const T product = from[i] * T(1 / 3.0);
                check(to[i] == product && std::signbit(to[i]) == std::signbit(product), where + "a wrong product");
            }
            check(to[n] == T(5), where + "written behind the end");
            for (std::size_t i = 0; i < n; ++i) {
                const T kept = from[i];
                for (const T odd : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN(),
                                    Limits::signaling_NaN()}) {
                    from[i] = odd;
                    check(!pack(n, to.data(), from.data(), 0.5), where + "NaN or Inf is not seen");
                }
                from[i] = kept;
            }
        }
    }
}

}  // namespace

int main() {
    packs<float>(Type::f32);
    packs<double>(Type::f64);
    check(pack_kernel(Type::f16) == nullptr, "a kernel for halves");
}
