/// Declares methods that call the method of the same name on the value of each variant.
/// The SDK uses this macro too.
#[macro_export]
macro_rules! enum_dispatch {
    ($variants:tt; $($vis:vis fn $name:ident $args:tt -> $ret:ty;)+) => {
        $($crate::enum_dispatch!(@method $variants $vis $name $args $ret);)+
    };
    (@method $variants:tt $vis:vis $name:ident
        ($self_:ident: $self_ty:ty $(, $arg:ident: $arg_ty:ty)* $(,)?) $ret:ty) => {
        #[inline]
        $vis fn $name($self_: $self_ty $(, $arg: $arg_ty)*) -> $ret {
            $crate::enum_dispatch!(@match $variants $self_ $name ($($arg),*))
        }
    };
    // The argument list arrives as one token tree, so that it can be repeated for each variant.
    (@match [$($variant:ident),+ $(,)?] $self_:ident $name:ident $args:tt) => {
        match $self_ {
            $(Self::$variant(inner) => inner.$name $args,)+
        }
    };
}
