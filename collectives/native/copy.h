// Copying between ranks. The C library's memcpy takes `rep movs` for middle sizes where the processor advertises it,
// which on some (AMD's Zen 3, measured) is four times slower than plain vector moves between cores' caches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace bitring {

inline void copy_bytes(void* to, const void* from, std::size_t nbytes) {
#if defined(__x86_64__)
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    for (; nbytes >= 64; nbytes -= 64, t += 64, f += 64) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 16));
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 32));
        const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 48));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(t), a);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(t + 16), b);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(t + 32), c);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(t + 48), d);
    }
    to = t;
    from = f;
#endif
    if (nbytes > 0) std::memcpy(to, from, nbytes);
}

// The same for what is not looked at soon: the copy goes to memory, not to the cache.
inline void copy_past_cache(void* to, const void* from, std::size_t nbytes) {
#if defined(__x86_64__)
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    const std::size_t before = std::min(nbytes, std::size_t(-reinterpret_cast<std::uintptr_t>(t)) % 16);
    std::memcpy(t, f, before);
    t += before, f += before, nbytes -= before;
    for (; nbytes >= 64; nbytes -= 64, t += 64, f += 64) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 16));
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 32));
        const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + 48));
        _mm_stream_si128(reinterpret_cast<__m128i*>(t), a);
        _mm_stream_si128(reinterpret_cast<__m128i*>(t + 16), b);
        _mm_stream_si128(reinterpret_cast<__m128i*>(t + 32), c);
        _mm_stream_si128(reinterpret_cast<__m128i*>(t + 48), d);
    }
    _mm_sfence();
    to = t;
    from = f;
#endif
    if (nbytes > 0) std::memcpy(to, from, nbytes);
}

}  // namespace bitring
