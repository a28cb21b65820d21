//! Collects the schemas that the `k8s_openapi` crate describes, by definition name.

use std::collections::BTreeMap;

use k8s_openapi::schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Value, json};

/// Group, version and kind.
pub type Gvk = (String, String, String);

pub struct Collector {
    generator: SchemaGenerator,
    /// Definitions that are made here.
    own: BTreeMap<String, Value>,
    pub roots: BTreeMap<Gvk, String>,
}

impl Collector {
    pub fn new() -> Collector {
        let mut settings = SchemaSettings::draft2020_12();
        settings.definitions_path = "/definitions".into();
        settings.meta_schema = None;
        Collector { generator: settings.into_generator(), own: BTreeMap::new(), roots: BTreeMap::new() }
    }

    /// A type that is part of the API without being an object of a group.
    pub fn plain<T: JsonSchema>(&mut self) -> String {
        self.generator.subschema_for::<T>();
        T::schema_name().into_owned()
    }

    /// A kind that requests or answers carry, but that is never listed.
    pub fn sent<T: JsonSchema + k8s_openapi::Resource>(&mut self) {
        let name = self.plain::<T>();
        self.root(T::GROUP, T::VERSION, T::KIND.to_owned(), name);
    }

    /// A kind with a list; the crate has one generic list type without a schema, so the schema is made here.
    pub fn stored<T: JsonSchema + k8s_openapi::Resource>(&mut self) {
        let name = self.plain::<T>();
        self.listed(T::GROUP, T::VERSION, T::KIND, &name);
    }

    /// A definition that the crate does not have.
    pub fn definition(&mut self, name: &str, schema: Value) {
        self.own.insert(name.to_owned(), schema);
    }

    /// Makes the definition `name` a kind with a list.
    pub fn listed(&mut self, group: &str, version: &str, kind: &str, name: &str) {
        let list = json!({
            "description": format!("{kind}List is a collection of {kind} objects."),
            "type": "object",
            "properties": {
                "apiVersion": { "type": "string", "description": "The version of the schema that this list is written in." },
                "items": { "type": "array", "description": "The objects.", "items": { "$ref": format!("#/definitions/{name}") } },
                "kind": { "type": "string", "description": "The name of the type of this list." },
                "metadata": {
                    "$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta",
                    "description": "Standard list metadata.",
                },
            },
            "required": ["items"],
        });
        self.own.insert(format!("{name}List"), list);
        self.root(group, version, format!("{kind}List"), format!("{name}List"));
        self.root(group, version, kind.to_owned(), name.to_owned());
    }

    fn root(&mut self, group: &str, version: &str, kind: String, name: String) {
        self.roots.insert((group.to_owned(), version.to_owned(), kind), name);
    }

    /// Every definition reached, by name, with references of the form `#/definitions/NAME`.
    pub fn finish(mut self) -> (BTreeMap<String, Value>, BTreeMap<Gvk, String>) {
        self.plain::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta>();
        let mut all = self.own;
        all.extend(self.generator.take_definitions(true));
        (all, self.roots)
    }
}
