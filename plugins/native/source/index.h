// cache=hash: the keys of core/blocks.py (Python's hash of a tuple) and the index of plugins/cache/hash.py over them.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace headway {

// Python's hash of a whole number that fits a word.
inline int64_t hash_of(int64_t value) {
    constexpr uint64_t MODULUS = (uint64_t(1) << 61) - 1;
    uint64_t size = value < 0 ? -uint64_t(value) : uint64_t(value);
    int64_t hash = int64_t(size % MODULUS);
    if (value < 0) hash = -hash;
    return hash == -1 ? -2 : hash;
}

// Python's hash of a tuple, item by item (CPython 3.8 and later, an xxHash of 64 bits).
class TupleHash {
   public:
    void add(int64_t hash) {
        state_ += uint64_t(hash) * 14029467366897019727u;
        state_ = (state_ << 31 | state_ >> 33) * 11400714785074694791u;
        length_++;
    }
    int64_t result() const {
        uint64_t hash = state_ + (length_ ^ (2870177450012600261u ^ 3527539u));
        return hash == ~uint64_t(0) ? 1546275796 : int64_t(hash);
    }

   private:
    uint64_t state_ = 2870177450012600261u, length_ = 0;
};

// Identity of a block's content: what comes before it, and its own tokens, none of them negative.
inline int64_t chain_key(int64_t parent_key, const int32_t* tokens, int64_t count) {
    TupleHash own, pair;
    for (int64_t i = 0; i < count; i++) own.add(tokens[i]);
    pair.add(hash_of(parent_key));
    pair.add(own.result());
    return pair.result();
}

// Key -> block. Open addressing with at most half of the places taken; what follows a removed entry moves up.
class KeyTable {
   public:
    static constexpr int32_t NONE = -1;

    KeyTable() : places_(64, Place{0, NONE}) {}

    int32_t find(int64_t key) const {
        for (size_t at = home(key);; at = next(at)) {
            if (places_[at].block == NONE || places_[at].key == key) return places_[at].block;
        }
    }

    void insert(int64_t key, int32_t block) {
        if (2 * ++count_ > places_.size()) grow();
        put(key, block);
    }

    void remove(int64_t key) {
        size_t gap = home(key);
        while (places_[gap].key != key || places_[gap].block == NONE) gap = next(gap);
        count_--;
        for (size_t at = next(gap); places_[at].block != NONE; at = next(at)) {
            size_t wanted = home(places_[at].key);
            bool may_move = gap <= at ? (wanted <= gap || wanted > at) : (wanted <= gap && wanted > at);
            if (may_move) places_[gap] = places_[at], gap = at;
        }
        places_[gap].block = NONE;
    }

   private:
    struct Place {
        int64_t key;
        int32_t block;
    };
    size_t home(int64_t key) const { return (uint64_t(key) * 0x9e3779b97f4a7c15u >> 20) & (places_.size() - 1); }
    size_t next(size_t at) const { return (at + 1) & (places_.size() - 1); }
    void put(int64_t key, int32_t block) {
        size_t at = home(key);
        while (places_[at].block != NONE) at = next(at);
        places_[at] = {key, block};
    }
    void grow() {
        std::vector<Place> before(2 * places_.size(), Place{0, NONE});
        before.swap(places_);
        for (auto& place : before)
            if (place.block != NONE) put(place.key, place.block);
    }

    std::vector<Place> places_;
    size_t count_ = 0;
};

// Which block holds this content. A hit compares the key, what comes before (a block, or a salt below zero) and the tokens.
class HashIndex {
   public:
    explicit HashIndex(int64_t block_size) : size_(block_size) {}

    // The block with this content, or NONE. A block of another content that shares the key is a miss.
    int32_t find(int64_t key, int32_t parent, const int32_t* tokens) const {
        int32_t block = by_key_.find(key);
        return block != KeyTable::NONE && holds(block, key, parent, tokens) ? block : KeyTable::NONE;
    }

    // The block that holds the content from now on: `block`, or a twin that was there before.
    int32_t insert(int64_t key, int32_t parent, const int32_t* tokens, int32_t block) {
        int32_t twin = by_key_.find(key);
        if (twin == KeyTable::NONE) {
            by_key_.insert(key, block);
        } else if (holds(twin, key, parent, tokens)) {
            return twin;
        }
        if (contents_.size() <= size_t(block)) {
            contents_.resize(block + 1);
            tokens_.resize((block + 1) * size_);
        }
        contents_[block] = {key, parent};
        std::memcpy(&tokens_[block * size_], tokens, size_ * sizeof(int32_t));
        return block;
    }

    void remove(int32_t block) {
        if (by_key_.find(contents_[block].key) == block) by_key_.remove(contents_[block].key);
    }

   private:
    struct Content {
        int64_t key;
        int32_t parent;
    };
    bool holds(int32_t block, int64_t key, int32_t parent, const int32_t* tokens) const {
        const Content& content = contents_[block];
        return content.key == key && content.parent == parent && !std::memcmp(&tokens_[block * size_], tokens, size_ * sizeof(int32_t));
    }

    int64_t size_;
    KeyTable by_key_;
    std::vector<Content> contents_;  // by block
    std::vector<int32_t> tokens_;    // block_size of them per block
};

}  // namespace headway
