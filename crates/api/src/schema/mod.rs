//! The structure of every built-in type: fields, shapes, how lists merge, protobuf numbers.
//!
//! The tables are made by `build/` from the `k8s_openapi` crate and `data/`; they are constants that are
//! used where they lie, so nothing is decoded or kept at run time. Descriptions are not here, see
//! [`crate::openapi`]. The schemas of custom resources are another matter and do not pass through here.

mod conform;

pub(crate) use conform::describe;
pub use conform::{MAX_PROBLEMS, TypeError, complete, conform};

include!(concat!(env!("OUT_DIR"), "/schema.rs"));

/// A type with fields, such as `Deployment` or `PodSpec`.
#[derive(Debug)]
pub struct Type {
    name: Str,
    fields: (u16, u16),
    proto: (u16, u16),
    atomic: bool,
}

/// One field of a [`Type`].
#[derive(Debug)]
pub struct Field {
    name: Str,
    go: Str,
    merge_key: Str,
    list_keys: Str,
    shape: u16,
    flags: u16,
}

/// What JSON value a field takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    String,
    Bool,
    Int32,
    Int64,
    Float,
    /// Base64 text.
    Bytes,
    /// RFC 3339 in seconds.
    Time,
    /// RFC 3339 in microseconds.
    MicroTime,
    IntOrString,
    Quantity,
    /// Any JSON, kept as it is.
    Raw,
    /// The three unions in the schema of a CustomResourceDefinition.
    SchemaOrBool,
    SchemaOrArray,
    SchemaOrStrings,
    Object(TypeId),
    Array(ShapeId),
    /// An object with free keys.
    Map(ShapeId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeId(u16);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShapeId(u16);

/// A field of a protobuf message and the JSON field that it carries.
#[derive(Debug)]
pub struct ProtoField {
    pub number: u16,
    field: u16,
    inline: (u16, u16),
}

/// What a protobuf field holds.
pub enum ProtoContent {
    Field(&'static Field),
    /// A message whose fields JSON shows as fields of the parent.
    Inline(&'static [ProtoField]),
}

/// A slice of `STRINGS`: offset and length.
#[derive(Debug, Clone, Copy)]
struct Str(u32, u16);

#[derive(Debug)]
struct Root {
    group: Str,
    version: Str,
    kind: Str,
    ty: u16,
}

const INLINE: u16 = u16::MAX;

const REQUIRED: u16 = 1;
const KNOWN: u16 = 1 << 1;
const POINTER: u16 = 1 << 2;
const OMITEMPTY: u16 = 1 << 3;
const WRAPPED: u16 = 1 << 4;
const MERGE: u16 = 1 << 5;
const REPLACE: u16 = 1 << 6;
const RETAIN_KEYS: u16 = 1 << 7;
const LIST_ATOMIC: u16 = 1 << 8;
const LIST_SET: u16 = 1 << 9;
const LIST_MAP: u16 = 1 << 10;
const MAP_ATOMIC: u16 = 1 << 11;

/// How server-side apply treats a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListType {
    /// Owned and replaced as a whole, which is also what an unmarked list is.
    Atomic,
    /// Of scalars, each of them once.
    Set,
    /// Of objects told apart by [`Field::list_keys`].
    Map,
}

/// How a strategic merge patch treats a list or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchStrategy {
    pub merge: bool,
    pub replace: bool,
    pub retain_keys: bool,
}

impl Str {
    fn get(self) -> &'static str {
        &STRINGS[self.0 as usize..self.0 as usize + self.1 as usize]
    }
}

/// The schema of a kind. Options that are sent to every group (`DeleteOptions`, `Status`) are found under any.
pub fn of(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    let find = |group: &str, version: &str| {
        let at = ROOTS.binary_search_by(|r| {
            (r.group.get(), r.version.get(), r.kind.get()).cmp(&(group, version, kind))
        });
        at.ok().map(|i| &TYPES[ROOTS[i].ty as usize])
    };
    find(group, version).or_else(|| match kind {
        "DeleteOptions" => by_name("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"),
        "Status" => by_name("io.k8s.apimachinery.pkg.apis.meta.v1.Status"),
        _ => None,
    })
}

/// The schema of a kind by the `apiVersion` and `kind` of an object.
pub fn of_api_version(api_version: &str, kind: &str) -> Option<&'static Type> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    of(group, version, kind)
}

/// A type by its OpenAPI definition name, such as `io.k8s.api.core.v1.PodSpec`.
pub fn by_name(name: &str) -> Option<&'static Type> {
    TYPES.binary_search_by(|t| t.name.get().cmp(name)).ok().map(|i| &TYPES[i])
}

/// Every kind that has a schema: group, version, kind and its type, in that order.
pub fn kinds() -> impl Iterator<Item = (&'static str, &'static str, &'static str, &'static Type)> {
    ROOTS.iter().map(|r| (r.group.get(), r.version.get(), r.kind.get(), &TYPES[r.ty as usize]))
}

impl Type {
    /// The OpenAPI definition name.
    pub fn name(&self) -> &'static str {
        self.name.get()
    }

    /// The bare name, such as `PodSpec`.
    pub fn short_name(&self) -> &'static str {
        let name = self.name();
        name.rsplit_once('.').map_or(name, |(_, short)| short)
    }

    /// `v1.PodSpec`: how the reference implementation's messages name the type.
    pub fn go_name(&self) -> &'static str {
        let name = self.name();
        let dots: Vec<usize> = name.match_indices('.').map(|(i, _)| i).collect();
        dots.len().checked_sub(2).map_or(name, |i| &name[dots[i] + 1..])
    }

    /// By name, in order.
    pub fn fields(&self) -> &'static [Field] {
        &FIELDS[self.fields.0 as usize..][..self.fields.1 as usize]
    }

    pub fn field(&self, name: &str) -> Option<&'static Field> {
        let fields = self.fields();
        fields.binary_search_by(|f| f.name.get().cmp(name)).ok().map(|i| &fields[i])
    }

    /// Whether server-side apply owns objects of this type as a whole.
    pub fn is_atomic(&self) -> bool {
        self.atomic
    }

    /// The protobuf message; empty for types that have none.
    pub fn proto(&self) -> &'static [ProtoField] {
        &PROTO[self.proto.0 as usize..][..self.proto.1 as usize]
    }
}

impl PartialEq for Type {
    fn eq(&self, other: &Type) -> bool {
        std::ptr::eq(self, other)
    }
}

impl ProtoField {
    pub fn content(&self) -> ProtoContent {
        match self.field {
            INLINE => ProtoContent::Inline(&PROTO[self.inline.0 as usize..][..self.inline.1 as usize]),
            field => ProtoContent::Field(&FIELDS[field as usize]),
        }
    }
}

impl ShapeId {
    pub fn get(self) -> Shape {
        SHAPES[self.0 as usize]
    }
}

impl TypeId {
    pub fn get(self) -> &'static Type {
        &TYPES[self.0 as usize]
    }
}

impl Shape {
    /// The type behind an object, or behind the items of a list or map.
    pub fn element_type(self) -> Option<&'static Type> {
        match self {
            Shape::Object(ty) => Some(ty.get()),
            Shape::Array(items) | Shape::Map(items) => items.get().element_type(),
            _ => None,
        }
    }
}

impl Field {
    pub fn name(&self) -> &'static str {
        self.name.get()
    }

    pub fn shape(&self) -> Shape {
        SHAPES[self.shape as usize]
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub fn required(&self) -> bool {
        self.has(REQUIRED)
    }

    /// Whether an explicit zero (`0`, `false`, `""`) differs from leaving the field out.
    ///
    /// The reference types tell by having a pointer there. Of fields newer than the table, a number or
    /// boolean that is optional is taken for one, as is the rule for new fields, and a string is not.
    pub fn keeps_zero(&self) -> bool {
        if self.has(KNOWN) {
            return self.has(POINTER) || !self.has(OMITEMPTY);
        }
        self.required() || !matches!(self.shape(), Shape::String)
    }

    /// Whether the reference encoder writes this field even when nobody set it.
    pub fn always_written(&self) -> bool {
        // Values that are structs there are never empty in its eyes.
        let structure = matches!(self.shape(), Shape::Object(_) | Shape::Quantity | Shape::IntOrString);
        self.has(KNOWN) && !self.has(POINTER) && (structure || !self.has(OMITEMPTY))
    }

    /// In protobuf, whether the list is a message of its own with the items in field 1.
    pub fn wrapped(&self) -> bool {
        self.has(WRAPPED)
    }

    /// Whether `[]` and `{}` in a list or map differ from leaving the field out.
    fn keeps_empty(&self) -> bool {
        if self.has(KNOWN) { !self.has(OMITEMPTY) } else { self.required() }
    }

    /// The type as the reference implementation's messages spell it, such as `int32` or `[]v1.Container`.
    pub fn go_type(&self) -> String {
        match self.go.get() {
            "" => go_type(self.shape()),
            known => known.to_owned(),
        }
    }

    pub fn patch_strategy(&self) -> PatchStrategy {
        PatchStrategy {
            merge: self.has(MERGE),
            replace: self.has(REPLACE),
            retain_keys: self.has(RETAIN_KEYS),
        }
    }

    /// The field that tells items of a list apart in a strategic merge patch; empty for lists of scalars.
    pub fn merge_key(&self) -> &'static str {
        self.merge_key.get()
    }

    pub fn list_type(&self) -> ListType {
        match self.flags & (LIST_SET | LIST_MAP | LIST_ATOMIC) {
            LIST_SET => ListType::Set,
            LIST_MAP => ListType::Map,
            _ => ListType::Atomic,
        }
    }

    /// The fields that tell items of a [`ListType::Map`] apart.
    pub fn list_keys(&self) -> impl Iterator<Item = &'static str> {
        self.list_keys.get().split(',').filter(|k| !k.is_empty())
    }

    /// Whether server-side apply owns the object or map in this field as a whole.
    pub fn is_atomic_map(&self) -> bool {
        self.has(MAP_ATOMIC) || matches!(self.shape(), Shape::Object(ty) if ty.get().atomic)
    }
}

/// The reference implementation's name for values of a shape.
pub(crate) fn go_type(shape: Shape) -> String {
    match shape {
        Shape::String => "string".into(),
        Shape::Bool => "bool".into(),
        Shape::Int32 => "int32".into(),
        Shape::Int64 => "int64".into(),
        Shape::Float => "float64".into(),
        Shape::Bytes => "[]uint8".into(),
        Shape::Time => "v1.Time".into(),
        Shape::MicroTime => "v1.MicroTime".into(),
        Shape::IntOrString => "intstr.IntOrString".into(),
        Shape::Quantity => "resource.Quantity".into(),
        Shape::Raw => "runtime.RawExtension".into(),
        Shape::SchemaOrBool => "v1.JSONSchemaPropsOrBool".into(),
        Shape::SchemaOrArray => "v1.JSONSchemaPropsOrArray".into(),
        Shape::SchemaOrStrings => "v1.JSONSchemaPropsOrStringArray".into(),
        Shape::Object(ty) => ty.get().go_name().into(),
        Shape::Array(items) => format!("[]{}", go_type(items.get())),
        Shape::Map(items) => format!("map[string]{}", go_type(items.get())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(ty: &str, name: &str) -> &'static Field {
        by_name(ty).and_then(|t| t.field(name)).unwrap_or_else(|| panic!("{ty}.{name}"))
    }

    #[test]
    fn every_kind_that_is_served_has_a_schema_and_a_list() {
        for kind in crate::KINDS {
            let ty = of(kind.group, kind.version, kind.kind).unwrap_or_else(|| panic!("{}", kind.kind));
            assert_eq!(ty.short_name(), kind.kind);
            if kind.has_verb("list") {
                let list = of(kind.group, kind.version, &format!("{}List", kind.kind)).expect("a list");
                assert!(
                    matches!(list.field("items").map(Field::shape), Some(Shape::Array(_))),
                    "{}",
                    kind.kind
                );
            }
            // What was never a part of the API server's own groups is sent as JSON only.
            assert_eq!(ty.proto().is_empty(), kind.group == "metrics.k8s.io", "{}", kind.kind);
        }
    }

    #[test]
    fn structure_is_what_upstream_says() {
        let deployment = of("apps", "v1", "Deployment").expect("a schema");
        assert_eq!(deployment.go_name(), "v1.Deployment");
        let spec = field("io.k8s.api.apps.v1.Deployment", "spec").shape().element_type().expect("an object");
        assert_eq!(spec.field("replicas").map(Field::shape), Some(Shape::Int32));
        assert!(spec.field("template").is_some_and(Field::required));
        assert!(spec.field("strategy").is_some_and(|f| f.patch_strategy().retain_keys));
        let containers = field("io.k8s.api.core.v1.PodSpec", "containers");
        assert_eq!((containers.merge_key(), containers.list_type()), ("name", ListType::Map));
        let ports = field("io.k8s.api.core.v1.ServiceSpec", "ports");
        assert_eq!(ports.merge_key(), "port");
        assert_eq!(ports.list_keys().collect::<Vec<_>>(), ["port", "protocol"]);
        assert!(field("io.k8s.api.core.v1.ServiceSpec", "selector").is_atomic_map());
    }

    #[test]
    fn zeros_are_told_from_absence_where_pointers_are() {
        assert!(field("io.k8s.api.apps.v1.DeploymentSpec", "replicas").keeps_zero());
        assert!(!field("io.k8s.api.apps.v1.DeploymentSpec", "minReadySeconds").keeps_zero());
        assert!(field("io.k8s.api.core.v1.PersistentVolumeClaimSpec", "storageClassName").keeps_zero());
        assert!(!field("io.k8s.api.core.v1.PodSpec", "hostNetwork").keeps_zero());
    }

    #[test]
    fn options_are_found_under_any_group() {
        assert!(of("apps", "v1", "DeleteOptions").is_some());
        assert!(of("apps", "v1", "Nonsense").is_none());
    }
}
