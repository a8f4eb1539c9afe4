// BLAKE2b (RFC 7693) without a key, with a digest of 16 bytes: the decision log's hash.
#pragma once
#include <cstdint>
#include <cstring>

namespace headway {

class Blake2b {
   public:
    static constexpr int DIGEST = 16;

    Blake2b() {
        std::memcpy(state_, INITIAL, sizeof state_);
        state_[0] ^= 0x01010000 ^ DIGEST;
    }

    void update(const void* data, size_t size) {
        auto* bytes = static_cast<const uint8_t*>(data);
        while (size > 0) {
            if (filled_ == BLOCK) compress(false);  // the last block is compressed by `digest`, so one always stays
            size_t taken = size < BLOCK - filled_ ? size : BLOCK - filled_;
            std::memcpy(buffer_ + filled_, bytes, taken);
            filled_ += taken, bytes += taken, size -= taken;
        }
    }

    // The digest of what has come so far; more may follow.
    void digest(uint8_t out[DIGEST]) const {
        Blake2b last = *this;
        std::memset(last.buffer_ + last.filled_, 0, BLOCK - last.filled_);
        last.compress(true);
        std::memcpy(out, last.state_, DIGEST);  // words are little-endian, as on every machine that this is built for
    }

   private:
    static constexpr size_t BLOCK = 128;
    static constexpr uint64_t INITIAL[8] = {
        0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
        0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static constexpr uint8_t SCHEDULE[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

    static uint64_t turned(uint64_t x, int by) { return x >> by | x << (64 - by); }

    static void mix(uint64_t* v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
        v[a] += v[b] + x, v[d] = turned(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 24);
        v[a] += v[b] + y, v[d] = turned(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 63);
    }

    void compress(bool last) {
        uint64_t v[16], m[16];
        length_ += filled_;
        std::memcpy(v, state_, sizeof state_);
        std::memcpy(v + 8, INITIAL, sizeof INITIAL);
        std::memcpy(m, buffer_, sizeof m);
        v[12] ^= length_;
        if (last) v[14] = ~v[14];
        for (int round = 0; round < 12; round++) {
            const uint8_t* s = SCHEDULE[round % 10];
            for (int i = 0; i < 4; i++) mix(v, i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
            for (int i = 0; i < 4; i++) mix(v, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[2 * i + 8]], m[s[2 * i + 9]]);
        }
        for (int i = 0; i < 8; i++) state_[i] ^= v[i] ^ v[i + 8];
        filled_ = 0;
    }

    uint64_t state_[8];
    uint64_t length_ = 0;  // bytes compressed; 2^64 are more than any run decides
    uint8_t buffer_[BLOCK];
    size_t filled_ = 0;
};

}  // namespace headway
