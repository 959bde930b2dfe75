//! What must be true of any text as a policy, shared by the fuzzer and the bounded run in the tests.

use netoken::policy::compile::{Naming, compile};
use netoken::policy::read::{Options, read_text};
use netoken::policy::write::to_toml;

/// It is refused with a place in it, or it can be used, and then what is written of it reads back as the same.
pub fn check(text: &str) {
    let options = Options { allow_missing: true, ..Options::default() };
    match read_text("any", text, &options) {
        Err(report) => {
            assert!(report.has_errors(), "refused without a reason");
            assert!(!report.render(false).is_empty() && !report.to_string().is_empty());
        }
        Ok(checked) => {
            checked.report.render(true);
            // It may be beyond the limits, which is said in words.
            if let Err(refused) = compile(&checked.policy, Naming::none(), &[]) {
                checked.refuse(&refused).render(false);
            }
            let written = to_toml(&checked.policy);
            let again = read_text("again", &written, &options);
            let again = again.unwrap_or_else(|report| panic!("{report}\nof\n{written}"));
            assert_eq!(again.policy, checked.policy, "{written}");
        }
    }
}
