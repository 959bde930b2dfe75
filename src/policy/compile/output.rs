//! Writes what was collected in the form that the kernel reads.

use rustc_hash::FxHashMap;

use super::super::Policy;
use super::compiler::{Compiler, Variant};
use super::encode::{describe_mask, facts, raw_rule};
use super::{CHECKS_MAX, Compiled, Refused};
use crate::types::{Entry, Record, Rule as RawRule, Shape};

impl Compiler<'_> {
    /// What the kernel needs. `hits` holds the number of each rule's hit counter.
    ///
    /// # Errors
    /// A token has no room for the number of its rule.
    pub(super) fn finish(self, policy: &Policy, hits: &[u32]) -> Result<Compiled, Refused> {
        let mut compiled = Compiled {
            generation: Box::default(),
            entries: Vec::with_capacity(self.chains.len()),
            records: Vec::new(),
            sets: Vec::new(),
            shapes: self.describe_shapes(),
            plan: self.plan,
        };
        let mut rules = Vec::with_capacity(policy.rules.len());
        for (index, rule) in policy.rules.iter().enumerate() {
            let number = index as u32 + 1;
            let hits = hits.get(index).copied().unwrap_or(0);
            rules.push(raw_rule(number, hits, &rule.decision, self.names).map_err(|error| Refused {
                rule: Some(index),
                what: format!("the token of rule '{}': {error:#}", rule.name),
                help: "give it more room".to_string(),
            })?);
        }
        let mut records = Records::new(&self, &rules);
        self.chains.for_each(|key, variants| {
            let first = &self.variants[variants[0] as usize];
            let mut entry = Entry { rule: rules[first.rule as usize - 1], ..Default::default() };
            if !first.checks.is_empty() {
                entry.record = records.of_chain(variants);
            }
            compiled.entries.push((facts(key), entry));
        });
        compiled.records = records.all;

        let generation = &mut compiled.generation;
        generation.shape_count = self.shapes.len() as u32;
        generation.level_count = self.levels.len() as u32;
        generation.needs = self.needs;
        generation.levels[..self.levels.len()].copy_from_slice(&self.levels);
        for (to, shape) in generation.shapes.iter_mut().zip(&self.shapes) {
            *to = *shape;
        }
        if let Some(default) = &policy.default {
            generation.default_rule = raw_rule(0, 0, default, self.names).map_err(|error| Refused {
                rule: None,
                what: format!("the token of the default: {error:#}"),
                help: "give it more room".to_string(),
            })?;
        }
        compiled.sets = self.sets.keys;
        Ok(compiled)
    }

    pub(super) fn describe_shapes(&self) -> Vec<String> {
        let describe =
            |shape: &Shape| describe_mask(&shape.mask, self.levels.get(usize::from(shape.level)).copied());
        self.shapes
            .iter()
            .map(|shape| format!("{} (from rule {})", describe(shape), shape.first_rule))
            .collect()
    }
}

/// The records of a policy. What is behind two keys alike is there once.
struct Records<'a> {
    compiler: &'a Compiler<'a>,
    rules: &'a [RawRule],
    /// Number 0 is none.
    all: Vec<Record>,
    /// The record of each variant behind which nothing comes, or 0.
    alone: Vec<u32>,
    /// The record of a variant and the one behind it.
    chained: FxHashMap<(u32, u32), u32>,
}

impl<'a> Records<'a> {
    fn new(compiler: &'a Compiler<'a>, rules: &'a [RawRule]) -> Self {
        Records {
            compiler,
            rules,
            all: vec![Record::default()],
            alone: vec![0; compiler.variants.len()],
            chained: FxHashMap::default(),
        }
    }

    /// The first record of variants that are tried one after the other.
    fn of_chain(&mut self, variants: &[u32]) -> u32 {
        let mut next = 0;
        for &variant in variants.iter().rev() {
            next = match next {
                0 if self.alone[variant as usize] != 0 => self.alone[variant as usize],
                0 => {
                    self.alone[variant as usize] = self.add(variant, 0);
                    self.alone[variant as usize]
                }
                _ => match self.chained.get(&(variant, next)) {
                    Some(known) => *known,
                    None => {
                        let record = self.add(variant, next);
                        self.chained.insert((variant, next), record);
                        record
                    }
                },
            };
        }
        next
    }

    /// Adds as many records as the variant's checks need, and returns the number of the first.
    fn add(&mut self, variant: u32, next: u32) -> u32 {
        let Variant { rule, checks } = &self.compiler.variants[variant as usize];
        let first = self.all.len() as u32;
        let checks = &self.compiler.checks[checks.clone()];
        let parts = checks.len().div_ceil(CHECKS_MAX).max(1);
        for part in 0..parts {
            let mine = &checks[part * CHECKS_MAX..checks.len().min((part + 1) * CHECKS_MAX)];
            let mut record = Record {
                rule: self.rules[*rule as usize - 1],
                next,
                more: if part + 1 < parts { first + part as u32 + 1 } else { 0 },
                checks_count: mine.len() as u32,
                ..Default::default()
            };
            record.checks[..mine.len()].copy_from_slice(mine);
            self.all.push(record);
        }
        first
    }
}
