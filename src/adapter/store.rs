//! The adapters that are resident: their names, slots and users.
//!
//! A slot is the expert number of a mixture. An adapter that is removed while requests use it takes no new ones and
//! leaves its slot with the last of them. The adapters' numbers are the backend's; none are kept here.

/// Why the store refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("an adapter named `{0}` is loaded already")]
    NameTaken(String),
    #[error("no adapter named `{0}` is loaded")]
    Unknown(String),
}

/// Resident adapters by slot.
#[derive(Default)]
pub struct AdapterStore {
    slots: Vec<Option<Resident>>,
}

struct Resident {
    /// `None` once removed.
    name: Option<String>,
    mixable: bool,
    users: usize,
}

impl AdapterStore {
    /// Takes an adapter in; returns its slot. One that replaces whole modules is not `mixable`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn insert(&mut self, name: &str, mixable: bool) -> Result<usize, StoreError> {
        if self.find(name).is_some() {
            return Err(StoreError::NameTaken(name.to_owned()));
        }
        let resident = Some(Resident { name: Some(name.to_owned()), mixable, users: 0 });
        match self.slots.iter().position(Option::is_none) {
            Some(slot) => {
                self.slots[slot] = resident;
                Ok(slot)
            }
            None => {
                self.slots.push(resident);
                Ok(self.slots.len() - 1)
            }
        }
    }

    /// How many adapters there are, removed ones that are still in use among them.
    pub fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Slot of a named adapter.
    pub fn find(&self, name: &str) -> Option<usize> {
        let named = |resident: &Resident| resident.name.as_deref() == Some(name);
        self.slots.iter().position(|resident| resident.as_ref().is_some_and(named))
    }

    /// Whether the adapter in a slot may be one of several, or have a weight other than 1.
    pub fn is_mixable(&self, slot: usize) -> bool {
        self.slots[slot].as_ref().is_some_and(|resident| resident.mixable)
    }

    /// Takes the name away. Returns the slot when it is free now, `None` when requests still use it.
    ///
    /// # Errors
    /// When there is no such adapter.
    pub fn remove(&mut self, name: &str) -> Result<Option<usize>, StoreError> {
        let slot = self.find(name).ok_or_else(|| StoreError::Unknown(name.to_owned()))?;
        if let Some(resident) = &mut self.slots[slot] {
            resident.name = None;
        }
        Ok(self.free_if_left(slot))
    }

    /// Counts a user of a slot.
    pub fn acquire(&mut self, slot: usize) {
        if let Some(resident) = &mut self.slots[slot] {
            resident.users += 1;
        }
    }

    /// Uncounts a user. Returns the slot when the adapter was removed meanwhile and this was its last user.
    pub fn release(&mut self, slot: usize) -> Option<usize> {
        if let Some(resident) = &mut self.slots[slot] {
            resident.users -= 1;
        }
        self.free_if_left(slot)
    }

    fn free_if_left(&mut self, slot: usize) -> Option<usize> {
        let left = self.slots[slot].as_ref().is_some_and(|r| r.name.is_none() && r.users == 0);
        left.then(|| {
            self.slots[slot] = None;
            slot
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_adapter_serves_its_users_and_frees_its_slot_after_them() {
        let mut store = AdapterStore::default();
        let a = store.insert("a", true).unwrap();
        let b = store.insert("b", true).unwrap();
        assert_eq!(store.insert("a", true), Err(StoreError::NameTaken("a".into())));
        store.acquire(a);
        store.acquire(a);
        assert_eq!(store.remove("a"), Ok(None));
        assert!(store.find("a").is_none());
        assert_eq!(store.release(a), None);
        let again = store.insert("a", true).unwrap();
        assert!(again != a && again != b, "the slot is still in use");
        assert_eq!(store.release(a), Some(a));
        assert_eq!(store.insert("c", true).unwrap(), a);
        assert_eq!(store.remove("b"), Ok(Some(b)));
        assert_eq!(store.remove("b"), Err(StoreError::Unknown("b".into())));
    }
}
