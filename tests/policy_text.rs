//! Text that nobody would write as a policy: pieces of good ones, cut, joined and changed at random. The seed is printed;
//! NETOKEN_SEED repeats a run. `fuzz/` has the same without an end.

#[path = "support/any_policy.rs"]
mod any_policy;

use std::time::{Duration, Instant};

const EXAMPLE: &str = include_str!("../examples/policy.toml");

/// Pieces that mean something.
const PIECES: [&str; 41] = [
    "[[rule]]\n",
    "[rule]\n",
    "[[ rule ]]",
    "name = 'a'\n",
    "name = \"b\\u0041\"\n",
    "dst = '10.0.0.0/8'\n",
    "src = ['::/0', '1.2.3.4']\n",
    "not_dst = '@s'\n",
    "port = [1, '2-3']\n",
    "src_port = '65535'\n",
    "not_port = 0\n",
    "mark = '0x1/0x3'\n",
    "not_mark = [1, 2]\n",
    "uid = 'root'\n",
    "not_uid = '0-4294967295'\n",
    "cgroup = '/'\n",
    "not_cgroup = ['/a/b']\n",
    "interface = 'lo'\n",
    "not_interface = ['x', 'y']\n",
    "action = 'skip'\n",
    "action = 'drop'\n",
    "action = 'stamp'\n",
    "token = 'x'\n",
    "token = '{rule:4}'\n",
    "token = \"{instance:8}\"\n",
    "when_full = 'drop'\n",
    "[prefixes]\n",
    "[ports]\n",
    "s = ['10.0.0.0/8']\n",
    "s = ['@s']\n",
    "s = []\n",
    "default = { action = 'skip' }\n",
    "missing = 'warn'\n",
    "include = []\n",
    "\"\"\"",
    "'''",
    "#",
    "\n",
    "]",
    "{",
    "\u{0}\u{7f}ä\u{10ffff}",
];

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end.max(1)
    }
}

fn text(random: &mut Random) -> String {
    let mut text = String::new();
    if random.below(3) == 0 {
        text.push_str(EXAMPLE);
    }
    for _ in 0..random.below(30) {
        text.push_str(PIECES[random.below(PIECES.len())]);
    }
    for _ in 0..random.below(4) {
        let mut at = random.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        match random.below(3) {
            0 => text.truncate(at),
            1 => text.insert(at, char::from(random.below(128) as u8)),
            _ => {
                if at < text.len() {
                    text.remove(at);
                }
            }
        }
    }
    text
}

#[test]
fn any_text_is_refused_or_reads_back_as_it_was_written() {
    let seed: Option<u64> = std::env::var("NETOKEN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    println!("random: NETOKEN_SEED={seed}");
    let mut random = Random(seed | 1);
    let end = Instant::now() + Duration::from_secs(20);
    let mut count = 0;
    while count < 20_000 && Instant::now() < end {
        let text = text(&mut random);
        let caught = std::panic::catch_unwind(|| any_policy::check(&text));
        assert!(caught.is_ok(), "seed {seed}: this text did it:\n{text}");
        count += 1;
    }
    println!("{count} texts");
    assert!(count >= 1000, "only {count} texts");
}

#[test]
fn what_begins_like_a_policy_is_read_to_every_length() {
    for at in (0..EXAMPLE.len()).filter(|at| EXAMPLE.is_char_boundary(*at)) {
        any_policy::check(&EXAMPLE[..at]);
    }
}
