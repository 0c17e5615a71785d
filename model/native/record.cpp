// The sections of a user record, read in one pass: where Python looks at each, and numpy takes a pass for every check and
// every copy, most of the time goes into calling them.
//
// A second reader of docs/record-format.md, for records as our builder writes them. It says nothing but yes or no:
// whatever it does not take, model/cache_format/record.py reads, and says what is wrong with it. Little-endian.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t HEADER = 104, SECTIONS_AT = 60, SECTION_HEAD = 8;
constexpr uint16_t PAIR = 1, SKETCH = 2, TAIL = 3, CODES = 4, MOST_FLAGS = 1;
enum : uint8_t { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, BFLOAT16 = 3 };
constexpr uint32_t EXPONENT = 0x7f800000;  // all of it set: infinite or not a number

template <typename T>
inline T get(const char* data, int64_t index = 0) {
    T value;
    std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

inline uint32_t bits_of(float value) { return get<uint32_t>(reinterpret_cast<const char*>(&value)); }
inline float float_of(uint32_t bits) { return get<float>(reinterpret_cast<const char*>(&bits)); }

// A half's exponent is smaller by 112, and its subnormals are 1.m less the 1 that they don't have.
inline uint32_t from_half(uint16_t half) {
    const uint32_t rest = (half & 0x7fffu) << 13, exponent = rest & (0x1fu << 23);
    const uint32_t subnormal = bits_of(float_of(rest + (113u << 23)) - float_of(113u << 23));
    const uint32_t value = exponent == 0 ? subnormal : exponent == (0x1fu << 23) ? rest | EXPONENT : rest + (112u << 23);
    return value | (half & 0x8000u) << 16;
}

// Whether all are finite.
template <typename Read>
inline bool copy_floats(int64_t count, char* out, Read read) {
    uint32_t infinite = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = read(i);
        infinite |= (bits & EXPONENT) == EXPONENT;
        std::memcpy(out + 4 * i, &bits, 4);
    }
    return infinite == 0;
}

struct Section {
    const char* payload;
    int64_t size;
};

struct Sections {
    const char *at, *end;

    bool next(uint16_t tag, Section& section) {
        if (end - at < SECTION_HEAD || get<uint16_t>(at) != tag || get<uint16_t>(at + 2) > MOST_FLAGS) return false;
        section = {at + SECTION_HEAD, get<uint32_t>(at + 4)};
        const int64_t padded = (section.size + 7) & ~int64_t{7};
        if (padded > end - section.payload) return false;
        for (int64_t i = section.size; i < padded; ++i)
            if (section.payload[i]) return false;
        at = section.payload + padded;
        return true;
    }
};

// What a bundle's records look like. Where `out` has what, in bytes: keys and values from 0, then these.
struct Shape {
    int64_t short_length, width, rank, sketch_size, features, integer_ids, sections;
    const char* sketch_head;
    int64_t sketch_head_size;
    int64_t times_at, ids_at, sketch_at, codes_at;
};

bool read_pair(const Shape& shape, const Section& from, char* out) {
    if (from.size < 8 || get<uint16_t>(from.payload + 4) != shape.width || get<uint16_t>(from.payload + 6) != shape.rank)
        return false;
    if (from.payload[1] || get<uint16_t>(from.payload + 2)) return false;
    const int64_t rows = 2 * shape.rank, width = shape.width, count = rows * width, size = from.size - 8;
    const char* body = from.payload + 8;
    switch (get<uint8_t>(from.payload)) {
        case FLOAT32:
            return size == 4 * count && copy_floats(count, out, [=](int64_t i) { return get<uint32_t>(body, i); });
        case FLOAT16:
            return size == 2 * count &&
                   copy_floats(count, out, [=](int64_t i) { return from_half(get<uint16_t>(body, i)); });
        case BFLOAT16:
            return size == 2 * count &&
                   copy_floats(count, out, [=](int64_t i) { return uint32_t{get<uint16_t>(body, i)} << 16; });
        case INT8: {
            if (size != 4 * rows + count) return false;
            bool finite = true;
            for (int64_t row = 0; row < rows; ++row) {
                const float scale = get<float>(body, row);
                const char* values = body + 4 * rows + row * width;
                finite &= copy_floats(width, out + 4 * row * width, [=](int64_t i) {
                    return bits_of(static_cast<float>(get<int8_t>(values, i)) * scale);
                });
            }
            return finite;
        }
        default:
            return false;
    }
}

bool read_sketch(const Shape& shape, const Section& from, char* out) {
    const int64_t head = shape.sketch_head_size;
    if (from.size != head + shape.sketch_size || std::memcmp(from.payload, shape.sketch_head, head)) return false;
    std::memcpy(out, from.payload + head, shape.sketch_size);
    return true;
}

// Texts are left where they are: their offsets and UTF-8 are not checked here.
bool read_tail(const Shape& shape, const Section& from, char* times_out, char* ids_out) {
    const char* times = from.payload + 8;
    if (from.size < 8 || from.payload[0] != (shape.integer_ids ? 0 : 1)) return false;
    if (from.payload[1] || get<uint16_t>(from.payload + 2)) return false;
    const int64_t count = get<uint32_t>(from.payload + 4);
    if (count > shape.short_length || from.size < 8 + 8 * count) return false;
    for (int64_t i = 1; i < count; ++i)
        if (get<int64_t>(times, i) < get<int64_t>(times, i - 1)) return false;
    std::memcpy(times_out, times, 8 * count);
    if (!shape.integer_ids) return true;
    if (from.size != 8 + 16 * count) return false;
    std::memcpy(ids_out, times + 8 * count, 8 * count);
    return true;
}

bool read_codes(const Shape& shape, const Section& from, char* out) {
    if (from.size != 8 + 4 * shape.features || get<uint32_t>(from.payload) != shape.features) return false;
    if (get<uint32_t>(from.payload + 4)) return false;
    std::memcpy(out, from.payload + 8, 4 * shape.features);
    return true;
}

}  // namespace

extern "C" {

// data: a record whose header is checked. Where in it the tail's payload begins, or 0 if the sections are not the
// shape's, in order, whole and of finite numbers; what is in `out` then means nothing.
int64_t lrea_record_read(const char* data, int64_t size, const Shape* wanted, char* out) {
    const Shape& shape = *wanted;
    if (size < HEADER || get<uint32_t>(data + SECTIONS_AT) != shape.sections) return 0;
    Sections sections{data + HEADER, data + size};
    Section section;
    if (shape.rank && !(sections.next(PAIR, section) && read_pair(shape, section, out))) return 0;
    if (shape.sketch_size && !(sections.next(SKETCH, section) && read_sketch(shape, section, out + shape.sketch_at)))
        return 0;
    Section tail;
    if (!sections.next(TAIL, tail) || !read_tail(shape, tail, out + shape.times_at, out + shape.ids_at)) return 0;
    if (shape.features && !(sections.next(CODES, section) && read_codes(shape, section, out + shape.codes_at)))
        return 0;
    return sections.at == sections.end ? tail.payload - data : 0;
}
}
