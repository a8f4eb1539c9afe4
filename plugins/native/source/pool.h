// Who holds which KV block (core/blocks.py), with eviction=lru: the block that was touched longest ago goes first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "index.h"
#include "request.h"

namespace headway {

struct Block {
    int32_t ref_count = 0, parent = ROOT, num_children = 0;
    uint32_t generation = 0;  // grows when it is evicted
    uint64_t version = 0;     // grows when a child is published
    uint64_t last_access = 0;
    bool cached = false, evictable = false;  // evictable: cached, unreferenced and without cached children
};

class Pool {
   public:
    Pool(int64_t num_blocks, int64_t block_size, bool caches)
        : num_blocks(num_blocks), block_size(block_size), caches(caches), index(block_size) {}

    const int64_t num_blocks, block_size;
    const bool caches;  // false: cache=none
    HashIndex index;
    std::vector<Block> blocks;  // made at first use
    int64_t num_cached = 0, num_evictable = 0, num_evictions = 0;
    uint64_t root_version = 0;
    std::vector<int64_t> evicted;  // since the last plan

    int64_t num_available() const { return num_blocks - int64_t(blocks.size()) + int64_t(free_.size()) + num_evictable; }
    int64_t num_used() const { return num_blocks - num_available(); }
    int64_t blocks_for(int64_t num_tokens) const { return (num_tokens + block_size - 1) / block_size; }

    int32_t allocate() {
        int32_t id;
        if (!free_.empty()) {
            id = free_.back();
            free_.pop_back();
        } else if (int64_t(blocks.size()) < num_blocks) {
            id = int32_t(blocks.size());
            blocks.emplace_back();
        } else {
            id = evict();
        }
        blocks[id].ref_count = 1;
        return id;
    }

    // One more reference on a cached block; a prefix hit touches it.
    void acquire(int32_t id, bool hit) {
        Block& block = blocks[id];
        if (block.ref_count++ == 0) {
            num_evictable--;
            withdraw(block);
        }
        if (hit) block.last_access = ++touches_;
    }

    // Tail first, so that a prefix outlives what hangs under it.
    void release(const std::vector<int32_t>& ids) {
        for (auto id = ids.rbegin(); id != ids.rend(); ++id) {
            Block& block = blocks[*id];
            block.ref_count--;
            if (block.cached) block.last_access = ++touches_;
            if (block.ref_count > 0) continue;
            if (block.cached) {
                num_evictable++;
                offer(*id);
            } else {
                free_.push_back(*id);
            }
        }
    }

    // Makes a full, computed block matchable. Returns the block that the index holds for its content.
    int32_t publish(Request& request, int64_t place) {
        int32_t id = request.block_table[place], parent = request.published_parent;
        int64_t key = request.key(place, block_size);
        int32_t canonical = index.insert(key, parent == ROOT ? request.salt : parent, &request.tokens[place * block_size], id);
        if (canonical != id) {
            acquire(canonical, false);
            return canonical;
        }
        Block& block = blocks[id];
        block.cached = true, block.parent = parent, block.num_children = 0, block.last_access = ++touches_;
        if (parent == ROOT) {
            root_version++;
        } else {
            Block& above = blocks[parent];
            withdraw(above);  // no longer a leaf
            above.num_children++;
            above.version++;
        }
        num_cached++;
        return id;
    }

   private:
    using Entry = std::pair<uint64_t, int32_t>;  // last access, block

    // A block that nobody holds may be evicted if it is a leaf.
    void offer(int32_t id) {
        Block& block = blocks[id];
        if (block.num_children || block.evictable) return;
        block.evictable = true;
        num_offered_++;
        push({block.last_access, id});
    }

    void push(const Entry& entry) {
        heap_.push_back(entry);
        std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    }

    // The block that was touched longest ago, of those that stand.
    int32_t take_oldest() {
        while (!heap_.empty()) {
            Entry entry = heap_.front();
            std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
            heap_.pop_back();
            if (stands(entry)) return entry.second;
        }
        throw std::logic_error("blocks are evictable, and none of them is a leaf");
    }

    // Its entry in the heap is dropped when its turn comes, or when most entries are such.
    void withdraw(Block& block) {
        if (!block.evictable) return;
        block.evictable = false;
        num_offered_--;
        if (int64_t(heap_.size()) <= 2 * num_offered_ + 64) return;
        heap_.erase(std::remove_if(heap_.begin(), heap_.end(), [this](const Entry& e) { return !stands(e); }), heap_.end());
        std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
    }

    bool stands(const Entry& entry) const {
        return blocks[entry.second].evictable && blocks[entry.second].last_access == entry.first;
    }

    int32_t evict() {
        int32_t id = parent_of_last_;
        parent_of_last_ = ROOT;
        if (id == ROOT || !blocks[id].evictable || (!heap_.empty() && heap_.front().first < blocks[id].last_access)) {
            if (id != ROOT && blocks[id].evictable) push({blocks[id].last_access, id});
            id = take_oldest();
        }
        Block& block = blocks[id];
        index.remove(id);
        block.evictable = block.cached = false;
        block.generation++;
        num_offered_--, num_cached--, num_evictable--, num_evictions++;
        evicted.push_back(id);
        if (block.parent != ROOT && --blocks[block.parent].num_children == 0 && blocks[block.parent].ref_count == 0) {
            blocks[block.parent].evictable = true;
            num_offered_++;
            parent_of_last_ = block.parent;
        }
        return id;
    }

    std::vector<int32_t> free_;  // of those that were made
    std::vector<Entry> heap_;
    int32_t parent_of_last_ = ROOT;  // of the block that was evicted last, if it is a leaf now: mostly the next one, so not in the heap
    int64_t num_offered_ = 0;  // entries of the heap that stand
    uint64_t touches_ = 0;
};

}  // namespace headway
