//! Which keys there are and what each takes, as the structs themselves have it: they are
//! deserialised from nothing, and what they ask for on the way is written down.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use serde::{
    Deserializer,
    de::{
        DeserializeOwned, DeserializeSeed, EnumAccess, Error as _, MapAccess, SeqAccess,
        VariantAccess, Visitor,
        value::{Error, StrDeserializer},
    },
    forward_to_deserialize_any,
};

/// What a key takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Boolean,
    Number,
    Choice(&'static [&'static str]),
    List(Box<Kind>),
    /// Names of the user's own, with a text each.
    Table,
    /// Decided by what is given.
    Mixed,
}

/// Every key by its full name, `section.key`.
pub(super) struct Keys(BTreeMap<String, Kind>);

/// More alike than this, as strsim measures it, is a slip; less is something else.
const ALIKE: f64 = 0.6;

impl Keys {
    pub fn of<T: DeserializeOwned>() -> Self {
        let found = RefCell::default();
        let tracer = Tracer {
            found: &found,
            path: String::new(),
            place: Place::Key,
        };
        // The answers given fit any type of the configuration; a test fails if one does not.
        let traced = T::deserialize(tracer);
        debug_assert!(traced.is_ok(), "{:?}", traced.err());
        Self(found.into_inner())
    }

    pub fn kind(&self, key: &str) -> Option<&Kind> {
        self.0.get(key)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The names of the keys in a section, without it.
    pub fn within(&self, section: &str) -> impl Iterator<Item = &str> {
        let prefix = format!("{section}.");
        self.names()
            .filter_map(move |key| key.strip_prefix(prefix.as_str()))
    }

    pub fn is_section(&self, name: &str) -> bool {
        self.within(name).next().is_some()
    }

    /// The open table that a key lies in, and its name there.
    pub fn in_table<'a>(&self, key: &'a str) -> Option<(&'a str, &'a str)> {
        key.match_indices('.').find_map(|(dot, _)| {
            let (table, entry) = (&key[..dot], &key[dot + 1..]);
            let open = self.kind(table) == Some(&Kind::Table) && !entry.is_empty();
            open.then_some((table, entry))
        })
    }

    pub fn sections(&self) -> impl Iterator<Item = &str> {
        let sections = self.names().filter_map(|key| key.rsplit_once('.'));
        let sections: BTreeSet<_> = sections.map(|(section, _)| section).collect();
        sections.into_iter()
    }

    /// The key, or the section, that was most likely meant.
    pub fn nearest(&self, wrong: &str) -> Option<String> {
        let (section, name) = wrong.rsplit_once('.').unwrap_or(("", wrong));
        if self.is_section(section) {
            // The right name in the wrong section is the surest guess.
            let ending = format!(".{name}");
            let moved = self.names().find(|key| key.ends_with(&ending));
            return moved.map(str::to_owned).or_else(|| {
                let name = most_alike(name, self.within(section))?;
                Some(format!("{section}.{name}"))
            });
        }
        let known = self.names().chain(self.sections());
        most_alike(wrong, known).map(str::to_owned)
    }
}

fn most_alike<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let alike = |known: &str| match known.starts_with(wrong) {
        true => 1.0,
        false => strsim::normalized_damerau_levenshtein(known, wrong),
    };
    known
        .map(|known| (alike(known), known))
        .filter(|(alike, _)| *alike >= ALIKE)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, known)| known)
}

#[derive(Clone, Copy, PartialEq)]
enum Place {
    Key,
    /// An item of the list that is the key.
    Item,
}

struct Tracer<'a> {
    found: &'a RefCell<BTreeMap<String, Kind>>,
    path: String,
    place: Place,
}

impl Tracer<'_> {
    fn note(&self, kind: Kind) {
        let kind = match self.place {
            Place::Key => kind,
            Place::Item => Kind::List(Box::new(kind)),
        };
        self.found.borrow_mut().insert(self.path.clone(), kind);
    }
}

macro_rules! numbers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.note(Kind::Number);
            visitor.visit_u64(1)
        }
    )*};
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Error;

    numbers!(deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64);
    numbers!(deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64);

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Boolean);
        visitor.visit_bool(false)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Text);
        // A URL, since some texts must be one.
        visitor.visit_str("ws://localhost")
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Mixed);
        visitor.visit_bool(false)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.place = Place::Item;
        visitor.visit_seq(Once(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Table);
        visitor.visit_map(Fields {
            of: self,
            left: &[],
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields {
            of: self,
            left: fields,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note(Kind::Choice(variants));
        visitor.visit_enum(First(variants))
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct
        identifier ignored_any
    }
}

/// One item of a list.
struct Once<'a>(Option<Tracer<'a>>);

impl<'de> SeqAccess<'de> for Once<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0
            .take()
            .map(|tracer| seed.deserialize(tracer))
            .transpose()
    }
}

struct Fields<'a> {
    of: Tracer<'a>,
    left: &'static [&'static str],
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let name = self.left.first();
        name.map(|name| seed.deserialize(StrDeserializer::new(name)))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some((name, left)) = self.left.split_first() else {
            return Err(Error::custom("a value without a key"));
        };
        self.left = left;
        let path = match self.of.path.as_str() {
            "" => (*name).to_owned(),
            section => format!("{section}.{name}"),
        };
        seed.deserialize(Tracer {
            found: self.of.found,
            path,
            place: Place::Key,
        })
    }
}

/// The first variant of an enum of plain names.
struct First(&'static [&'static str]);

impl<'de> EnumAccess<'de> for First {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name = self.0.first().copied().unwrap_or_default();
        let value = seed.deserialize(StrDeserializer::new(name))?;
        Ok((value, self))
    }
}

impl<'de> VariantAccess<'de> for First {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Error> {
        Err(Error::custom("not a plain name"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("not a plain name"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        Err(Error::custom("not a plain name"))
    }
}
