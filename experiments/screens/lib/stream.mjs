// Random draws that are a function of a key alone: the same key gives the same draws everywhere.
import { createHash } from 'node:crypto'

export class Stream {
  // Seeds sfc32 with the SHA-256 digest of the key.
  constructor(...key) {
    const digest = createHash('sha256').update(key.join('/')).digest()
    this.state = [0, 4, 8, 12].map(at => digest.readUInt32LE(at))
    for (let i = 0; i < 12; i++) this.bits()
  }

  // 32 random bits (sfc32).
  bits() {
    let [a, b, c, d] = this.state
    const sum = (((a + b) | 0) + d) | 0
    d = (d + 1) | 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) | 0
    c = (((c << 21) | (c >>> 11)) + sum) | 0
    this.state = [a, b, c, d]
    return sum >>> 0
  }

  // A whole number from low to high, both included.
  integer(low, high) {
    return low + (this.bits() % (high - low + 1))
  }

  // True with probability p.
  chance(p) {
    return this.bits() / 2 ** 32 < p
  }

  choice(items) {
    return items[this.integer(0, items.length - 1)]
  }

  // A permutation (Fisher-Yates).
  shuffled(items) {
    const out = [...items]
    for (let i = out.length - 1; i > 0; i--) {
      const j = this.integer(0, i)
      ;[out[i], out[j]] = [out[j], out[i]]
    }
    return out
  }

  // `count` different items.
  some(items, count) {
    return this.shuffled(items).slice(0, count)
  }
}
