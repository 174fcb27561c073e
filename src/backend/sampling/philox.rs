//! Philox 4×32-10: a random number as a pure function of key and counter.
//!
//! J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3. Ten
//! rounds; each multiplies two of the four counter words by constants, swaps halves and mixes in the key, which moves
//! on by a Weyl sequence between rounds.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The golden ratio and √3 − 1, as fractions of 2³².
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The generator of one seed.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    pub fn new(seed: u64) -> Self {
        Self { key: words(seed) }
    }

    /// Four random words for one counter value.
    pub fn block(self, counter: [u32; 4]) -> [u32; 4] {
        self.blocks(counter.map(|word| [word])).map(|[word]| word)
    }

    /// Four random words for each of `N` counter values, written so that the compiler computes them side by side: word
    /// `w` of value `i` lies at `[w][i]`, in counters and results.
    #[inline(always)]
    pub fn blocks<const N: usize>(self, counters: [[u32; N]; 4]) -> [[u32; N]; 4] {
        let [mut key_0, mut key_1] = self.key;
        let [mut a, mut b, mut c, mut d] = counters;
        for _ in 0..ROUNDS {
            for i in 0..N {
                let [low_0, high_0] = words(u64::from(MULTIPLIERS[0]) * u64::from(a[i]));
                let [low_1, high_1] = words(u64::from(MULTIPLIERS[1]) * u64::from(c[i]));
                [a[i], b[i], c[i], d[i]] = [high_1 ^ b[i] ^ key_0, low_1, high_0 ^ d[i] ^ key_1, low_0];
            }
            key_0 = key_0.wrapping_add(KEY_STEPS[0]);
            key_1 = key_1.wrapping_add(KEY_STEPS[1]);
        }
        [a, b, c, d]
    }

    /// 64 random bits for one position of one stream.
    pub fn bits(self, stream: u64, position: u64) -> u64 {
        let [position_low, position_high] = words(position);
        let [stream_low, stream_high] = words(stream);
        let [low, high, ..] = self.block([position_low, position_high, stream_low, stream_high]);
        u64::from(high) << 32 | u64::from(low)
    }
}

/// Low and high half.
fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that Random123, the authors' own library, publishes for philox4x32-10.
    #[test]
    fn matches_the_published_known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(Philox { key }.block(counter), expected);
        }
    }

    #[test]
    fn bits_are_uniform_and_depend_on_every_input() {
        let random = Philox::new(7);
        let mut tenths = [0; 10];
        for position in 0..10_000 {
            let fraction = random.bits(0, position) as f64 / 2f64.powi(64);
            tenths[(fraction * 10.0) as usize] += 1;
        }
        // A count's standard deviation is 30.
        assert!(tenths.iter().all(|count| (850..1150).contains(count)), "{tenths:?}");
        assert_ne!(random.bits(0, 1), random.bits(1, 0));
        assert_ne!(random.bits(0, 1), random.bits(0, 1 << 32));
        assert_ne!(random.bits(0, 1), Philox::new(7 | 1 << 32).bits(0, 1));
    }
}
